"""Which GPUs are meant, and what a process must find in its environment to see one of them."""

from __future__ import annotations

import pytest

from trtpool.broker.gpus import gpu_environment, gpu_list
from trtpool.ipc.errors import ConfigError, DeviceUnavailable

UUID = "GPU-5b1a2c3d-0000-1111-2222-333344445555"
MIG = "MIG-5b1a2c3d-0000-1111-2222-333344445555"
OLD_MIG = f"MIG-{UUID}/1/0"


@pytest.mark.parametrize(
    ("gpus", "names"),
    [
        (0, ("0",)),
        ("0", ("0",)),
        (" 1 , 2 ", ("1", "2")),
        ([3, "1"], ("3", "1")),  # in the user's order
        ("007", ("7",)),
        ("0,1", ("0", "1")),
        ((0, UUID, MIG, OLD_MIG), ("0", UUID, MIG, OLD_MIG)),
        (f"{UUID},{OLD_MIG}", (UUID, OLD_MIG)),
    ],
)
def test_what_users_name(gpus, names):
    assert gpu_list(gpus) == names


@pytest.mark.parametrize(
    "gpus", ["", [], -1, True, [0, 0], [0, "00"], "0,1,0", ["0,1"], [1.0], "MIG-", "GPU-a\nb", 1000]
)
def test_what_is_no_list_of_gpus(gpus):
    with pytest.raises(ConfigError, match="is not a list of different GPUs, such as 0,1 or GPU-<uuid>"):
        gpu_list(gpus)


@pytest.mark.parametrize("gpu", ["0", "7", UUID, MIG, OLD_MIG])
def test_a_process_sees_its_one_gpu(gpu):
    # What another order would make of indices is nobody's wish when no list says that it was meant.
    for environment in ({}, {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}):
        assert gpu_environment(gpu, environment) == {"CUDA_VISIBLE_DEVICES": gpu, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


@pytest.mark.parametrize(
    ("listed", "gpu", "seen"),
    [
        ("3,5", "0", "3"),
        ("3,5", "1", "5"),
        (" 3 , 5 ", "1", "5"),
        (f"{UUID},{MIG}", "1", MIG),
        ("3,5", UUID, UUID),  # an id says for itself which it is
        ("2,-1,5", "0", "2"),
    ],
)
def test_an_index_counts_in_the_list_that_is_there(listed, gpu, seen):
    environment = gpu_environment(gpu, {"CUDA_VISIBLE_DEVICES": listed})
    assert environment == {"CUDA_VISIBLE_DEVICES": seen, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def test_indices_in_the_list_keep_their_order():
    given = {"CUDA_VISIBLE_DEVICES": "3,5", "CUDA_DEVICE_ORDER": "FASTEST_FIRST"}
    assert gpu_environment("1", given) == {"CUDA_VISIBLE_DEVICES": "5", "CUDA_DEVICE_ORDER": "FASTEST_FIRST"}


@pytest.mark.parametrize(
    ("listed", "gpu", "count"),
    [
        ("3,5", "2", "2 GPUs"),
        ("3", "1", "1 GPU"),
        ("", "0", "0 GPUs"),
        ("2,-1,5", "1", "1 GPU"),
        ("NoDevFiles", "0", "0 GPUs"),
    ],
)
def test_an_index_beyond_the_list(listed, gpu, count):
    with pytest.raises(DeviceUnavailable) as raised:
        gpu_environment(gpu, {"CUDA_VISIBLE_DEVICES": listed})
    assert str(raised.value) == (
        f"--gpus {gpu}: CUDA_VISIBLE_DEVICES={listed} has {count}, counted from 0; "
        "choose among them, or change CUDA_VISIBLE_DEVICES"
    )
