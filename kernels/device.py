"""What Triton's kernels need of a machine, said once for all of them. Importing this needs neither Triton nor a GPU."""

import importlib.util

import torch


def cuda_capability(device: torch.device) -> int | None:
    """Compute capability as one number, 8.9 is 89; None where torch drives no NVIDIA card."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def num_sms(device: torch.device) -> int:
    """Multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def why_no_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """None if this machine runs Triton's kernels on activations of `dtype`, else the reason and what would help."""
    if device.type != "cuda":
        return f"runs on a CUDA device, not on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install 'nibble-serve[gpu]'"
    cc = cuda_capability(device)
    if cc is None:
        return "this torch sees no NVIDIA card; install one built for CUDA"
    if cc < 75:
        return f"needs compute capability 7.5, this card has {cc / 10}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"needs 16-bit activations, not {dtype}; serve with --dtype float16"
    if dtype == torch.bfloat16 and cc < 80:
        return f"bfloat16 needs compute capability 8.0, this card has {cc / 10}; serve with --dtype float16"
    return None
