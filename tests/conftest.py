"""Settings of every test run: no network, kernels interpreted where there is no GPU, and one thread, which is fastest for models this small and lets tests run side by side."""

import multiprocessing
import os

import torch

os.environ["HF_HUB_OFFLINE"] = "1"
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any test imports a kernel
torch.set_num_threads(1)
multiprocessing.set_forkserver_preload(["deepseek_lit.cli"])  # ranks are forked from a process that has imported the package
