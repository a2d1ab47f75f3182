"""Tries launch parameters of the kernels at DiT-XL/2's sizes; argument: seconds."""
import json, sys, time, torch, itertools
import triton
from speed_kernels import adaln, gelu
G=torch.device("cuda"); B,N,D=256,256,1152
bf=torch.bfloat16
def r(*s,d=bf): return torch.randn(*s,device=G,dtype=d)
x,branch,dy,dxo=r(B,N,D),r(B,N,D),r(B,N,D),r(B,N,D)
gate,shift,scale=r(B,D),r(B,D),r(B,D); bias=r(D)
h,dh=r(B*N,4*D),r(B*N,4*D)
flush=torch.empty(2**27,dtype=torch.int8,device=G)
def t(f,n=8):
    f(); f()
    torch.cuda.synchronize()
    ev=[torch.cuda.Event(enable_timing=True) for _ in range(2*n)]
    for i in range(n):
        flush.zero_(); ev[2*i].record(); f(); ev[2*i+1].record()
    torch.cuda.synchronize()
    v=sorted(ev[2*i].elapsed_time(ev[2*i+1]) for i in range(n)); return v[n//2]
out={"forward":{}, "backward":{}, "gelu":{}, "gelu forward": t(lambda: torch.nn.functional.gelu(h,approximate="tanh"))}
fwd=lambda: adaln._gated_residual_adaln(x,branch,gate,shift,scale,bias,1e-6)
y=fwd(); mean,rstd=y[2],y[3]
bwd=lambda: adaln._gated_residual_adaln_backward(dy,dxo,x,branch,gate,scale,mean,rstd,True)
gb=lambda: gelu._gelu_backward(dh,h)
truth_f=[a.clone() for a in fwd()]; tb=bwd(); truth_b=[tb[0].clone(),tb[1].clone(),tb[2].sum(1)]; tg=gb(); truth_g=[tg[0].clone(),tg[1].sum(0)]
begin=time.time(); limit=float(sys.argv[1])
best={}
def trial(kind,key,f,check):
    if time.time()-begin>limit: return
    try:
        ms=t(f); ok=check(f())
    except Exception as e:
        out[kind][key]=f"{type(e).__name__} {str(e)[:80]}"; return
    out[kind][key]=[round(ms,4),ok]
    if ok and ms<best.get(kind,(9e9,))[0]: best[kind]=(ms,key)
close=lambda a,b: bool(((a.float()-b.float()).norm()<=2e-3*b.float().norm()).item())
order=[(32,1,8),(32,2,8),(32,3,8),(16,3,8),(16,2,8),(32,4,8),(64,3,8),(16,1,8),(32,3,16),(32,2,16),(32,2,4),(32,3,4),(64,2,8),(8,2,8),(16,3,16),(16,3,4),(16,4,8),(32,1,16),(32,1,4),(64,1,8)]
for tok,st,el in order:
    adaln.TOKENS_BACKWARD,adaln.STAGES_BACKWARD,adaln.ELEMENTS=tok,st,el
    trial("backward",f"{tok},{st},{el}",bwd,lambda o: close(o[0],truth_b[0]) and close(o[1],truth_b[1]) and close(o[2].sum(1),truth_b[2]))
for tok,st,el in [(4,1,8),(4,2,8),(8,2,8),(8,3,8),(16,3,8),(16,2,8),(2,1,8),(1,1,8),(1,1,16),(1,1,4),(8,1,8),(8,3,16),(16,4,8),(4,3,8),(4,1,16),(8,1,16),(32,3,8)]:
    adaln.TOKENS_FORWARD,adaln.STAGES_FORWARD,adaln.ELEMENTS=tok,st,el
    trial("forward",f"{tok},{st},{el}",fwd,lambda o: close(o[0],truth_f[0]) and close(o[1],truth_f[1]))
for rows,tr,tc,st,w in [(128,4,512,1,4),(128,4,512,3,4),(128,4,512,2,4),(64,4,512,3,4),(128,8,256,3,4),(128,16,128,3,4),(128,4,512,1,8),(128,8,512,1,8),(128,8,512,2,8),(32,4,512,1,4),(64,4,512,1,4),(128,2,512,1,4),(128,2,1024,1,4),(128,2,1024,3,4),(64,2,512,3,2),(128,8,256,1,4),(128,4,256,2,4),(128,4,256,4,4),(256,4,512,3,4)]:
    gelu.ROWS,gelu.TILE_ROWS,gelu.TILE_COLUMNS,gelu.STAGES,gelu.WARPS=rows,tr,tc,st,w
    trial("gelu",f"{rows},{tr},{tc},{st},{w}",gb,lambda o: close(o[0],truth_g[0]) and close(o[1].sum(0),truth_g[1]))
out["best"]=best; out["seconds"]=time.time()-begin
src=flush; 
print(json.dumps(out,indent=1))
json.dump(out,open(sys.argv[2],"w"),indent=1)
