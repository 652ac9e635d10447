import torch


def test_device_is_there(device):
    assert torch.npu.is_available()
    assert torch.ones(3, device=device).sum().item() == 3


def test_subprocess(run_simulated):
    done = run_simulated(["-c", "import torch, torch_npu; print(torch.npu.device_count())"], devices=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "2"
