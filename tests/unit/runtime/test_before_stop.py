"""What is to be closed before a process leaves its groups is closed, once, and while they exist."""

import pytest
import torch.distributed

from megavlm.runtime import process


@pytest.mark.parametrize("clean", [True, False])
def test_closed_once_while_the_group_exists(clean: bool) -> None:
    seen: list[bool] = []
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    process.before_stop(lambda: seen.append(torch.distributed.is_initialized()))
    process.stop(clean=clean)
    process.stop(clean=clean)
    assert seen == [True]
