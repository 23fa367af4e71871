"""Diffusion on sklearn's digits: a small U-Net of diffusers and its EMA. Saves a pipeline of each.

    python examples/diffusion_digits.py 1000 run        so many steps, and the folder

What stands here for the lines about `EMAModel` in a training script of diffusers:

    EMAModel(unet.parameters(), use_ema_warmup=True, ...)   Averager(unet, ...), after `prepare`
    ema.step(unet.parameters())                             averager.attach(optimizer)
    ema.store(...), ema.copy_to(...), ema.restore(...)      with averager.applied():
    the hooks that save and load `unet_ema`                 register(accelerator, averager)
"""

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from sklearn.datasets import load_digits
from torch.nn.functional import mse_loss

from polyak import Averager
from polyak.integrations.accelerate import register

BLOCKS = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
SIZES = {"block_out_channels": [16, 32], "layers_per_block": 1, "norm_num_groups": 8}
set_seed(0)
digits = torch.tensor(load_digits().images / 8 - 1).float()[:, None]
unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, **SIZES, **BLOCKS)
schedule, accelerator = DDIMScheduler(), Accelerator(cpu=True)
unet, optimizer = accelerator.prepare(unet, torch.optim.AdamW(unet.parameters(), lr=2e-3))
register(accelerator, averager := Averager(unet, {"ema": "exponential(inverse_power())"}))
averager.attach(optimizer)


def loss(images):
    noise, times = torch.randn_like(images), torch.randint(0, 1000, [len(images)])
    return mse_loss(unet(schedule.add_noise(images, noise, times), times).sample, noise)


@torch.no_grad()
def judge(name, out=sys.argv[2]):
    set_seed(1)  # the same noise for both
    error = sum(loss(digits[1500:]) for _ in range(8)) / 8
    pipeline = DDIMPipeline(unet, schedule)
    made = torch.tensor(pipeline(64, num_inference_steps=20, output_type="np").images * 2 - 1)
    far = torch.cdist(made.flatten(1), digits.flatten(1)).amin(1).mean()
    pipeline.save_pretrained(f"{out}/{name}")
    print(f"{name}: held-out loss {error:.4f}, a sample is {far:.2f} from the nearest digit")


for _ in range(int(sys.argv[1])):
    accelerator.backward(loss(digits[torch.randint(0, 1500, [64])]))
    optimizer.step()
    optimizer.zero_grad()
accelerator.save_state(f"{sys.argv[2]}/state")
judge("live")
with averager.applied():
    judge("ema")
