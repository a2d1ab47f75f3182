import sys

import torch

import speed_engine as se

shards, here = sys.argv[1:]
small = {"dim": 32, "depth": 1, "num_heads": 2}
quick = {"num_images": 256, "solver_steps": 5, "every": 200}
run = se.train("digits", f"{here}/run", steps=200, batch_size=16, seed=1,
               data={"source": shards}, model=small, evaluation=quick)  # fmt: skip
losses = [record["loss"] for record in run.metrics if "loss" in record]
model = run.model()
print(losses[-1] < losses[0], run.evaluate(num_images=300)["fid"] > 0)
images = model.generate(4, labels=["frog"], seed=7)
model.save_pretrained(f"{here}/model")
torch.save(images, f"{here}/images.pt")
