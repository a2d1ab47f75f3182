"""LoRA of a text-to-image model of diffusers, such as Stable Diffusion, on pictures with captions.

    python examples/text_to_image_lora.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --images FOLDER --out runs/lora

FOLDER holds pictures and, beside NAME.png, the caption NAME.txt. Two lines are SpeeD's; what the
model predicts (noise or v) the method reads from its scheduler.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torch import Tensor

import speed_engine as se


def main() -> None:
    """Train the LoRA weights, and write them as the pipeline loads them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="pipeline, a folder or a name on the hub")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--size", type=int, default=512, help="side of the pictures in pixels")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = StableDiffusionPipeline.from_pretrained(options.model, safety_checker=None)
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    method = se.build_method("speed_paper", noise_scheduler)  # SpeeD 1
    pipeline.to(device)
    unet, vae, text_encoder = pipeline.unet, pipeline.vae, pipeline.text_encoder
    for part in (unet, vae, text_encoder):
        part.requires_grad_(False)
    layers = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=options.rank, target_modules=layers))
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def picture(path: Path) -> Tensor:
        image = Image.open(path).convert("RGB").resize((options.size, options.size))
        return torch.from_numpy(np.asarray(image)).permute(2, 0, 1) / 127.5 - 1

    paths = sorted(options.images.glob("*.png"))
    texts = pipeline.tokenizer(
        [path.with_suffix(".txt").read_text().strip() for path in paths],
        padding="max_length", truncation=True, return_tensors="pt",
    ).input_ids.to(device)  # fmt: skip
    for step in range(options.steps):
        chosen = torch.randint(len(paths), (options.batch_size,))
        with torch.no_grad():
            pictures = torch.stack([picture(paths[i]) for i in chosen]).to(device)
            clean = vae.encode(pictures).latent_dist.sample() * vae.config.scaling_factor
            states = text_encoder(texts[chosen.to(device)])[0]
        noise = torch.randn_like(clean)
        timesteps, weights = method.draw(len(clean), step, device)  # SpeeD 2
        noisy = noise_scheduler.add_noise(clean, noise, timesteps)
        target = noise
        if noise_scheduler.config.prediction_type == "v_prediction":
            target = noise_scheduler.get_velocity(clean, noise, timesteps)
        answer = unet(noisy, timesteps, encoder_hidden_states=states).sample
        error = F.mse_loss(answer.float(), target.float(), reduction="none").flatten(1).mean(1)
        loss = (weights * error).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}  loss {loss.item():.4f}")

    StableDiffusionPipeline.save_lora_weights(
        options.out, unet_lora_layers=get_peft_model_state_dict(unet)
    )


if __name__ == "__main__":
    main()
