"""One of two processes of a diffusers loop with gradient accumulation and a method that learns.

Usage: ``diffusers_rank.py RANK STORE OUT``. OUT gets the timesteps of every draw and what the
method learned.
"""

# pyright: reportPrivateImportUsage=false, reportArgumentType=false

import sys

import torch
import torch.distributed as dist
from diffusers import FlowMatchEulerDiscreteScheduler

from speed_engine.diffusion.method import build_method

RANK, STORE, OUT = int(sys.argv[1]), sys.argv[2], sys.argv[3]

dist.init_process_group("gloo", init_method=f"file://{STORE}", rank=RANK, world_size=2)
torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Conv2d(1, 1, 3, padding=1))
scheduler = FlowMatchEulerDiscreteScheduler()
method = build_method("adaptive", scheduler)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
drawn = []
for step in range(20):
    for _ in range(2):
        images = torch.randn(4 + RANK, 1, 8, 8)  # batches may differ in size
        noise = torch.randn_like(images)
        timesteps, _ = method.draw(len(images), step)
        drawn.append(timesteps)
        answer = model(scheduler.scale_noise(images, timesteps, noise))
        loss = method.loss((answer - (noise - images)).square().mean((1, 2, 3)))
        (loss / 2).backward()
    optimizer.step()
    optimizer.zero_grad()
learned = method.state_dict()["timesteps"]["distribution.squares"]
torch.save({"drawn": torch.cat(drawn), "learned": learned}, OUT)
dist.destroy_process_group()
