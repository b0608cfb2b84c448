"""What all tests share: no network, few threads, and the `gpu` mark."""
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault('HF_HUB_OFFLINE', '1') # a test that reaches for the hub fails at once instead of retrying
os.environ.setdefault('WANDB_MODE', 'disabled')

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable


def why_no_h100():
    """None on a machine whose first GPU is a Hopper card, else the reason that gpu tests are skipped."""
    import torch
    if not torch.cuda.is_available():
        return "no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    return None if (major, minor) == (9, 0) else f"needs sm_90, this device is sm_{major}{minor}"


def pytest_collection_modifyitems(items):
    gpu_items = [item for item in items if item.get_closest_marker('gpu')]
    reason = why_no_h100() if gpu_items else None
    for item in gpu_items:
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
