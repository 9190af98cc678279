"""Settings of every test run: no network, and one thread, which is fastest for models this small and lets tests run side by side."""

import os

import torch

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)
