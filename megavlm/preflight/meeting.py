"""Where the ranks tell each other what they found before they dare a collective, which would wait for a missing rank.

A key-value store on rank 0 with a time limit on every question. Nothing here needs all ranks to be there.
"""

import datetime
import os
import time
from collections.abc import Iterable

import torch.distributed


class Meeting:
    """The store, as one rank sees it."""

    def __init__(self, rank: int, world_size: int, timeout_seconds: float) -> None:
        """Open the store on rank 0, or reach it.

        Raises:
            TimeoutError: rank 0 does not answer in time. Names its address.
        """
        self.rank = rank
        self.world_size = world_size
        if "RANK" not in os.environ:
            self._store: torch.distributed.Store = torch.distributed.HashStore()
            return
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # torchrun has opened a store already, which the process group will use too
        is_host = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:
            store = torch.distributed.TCPStore(
                address,
                port,
                world_size,
                is_host,
                datetime.timedelta(seconds=timeout_seconds),
                wait_for_workers=False,
                multi_tenant=True,  # the process group opens one on the same port
            )
        except torch.distributed.DistError as error:
            if is_host:
                raise ValueError(f"MASTER_PORT={port}: cannot be opened on {address}: {_first_line(error)}") from None
            raise TimeoutError(f"no answer from rank 0 at {address}:{port} within {timeout_seconds:g} s") from None
        self._store = torch.distributed.PrefixStore("preflight", store)

    def tell(self, subject: str, text: str) -> None:
        """Say something about this rank."""
        self._store.set(f"{subject}/{self.rank}", text)

    def ask(self, subject: str, rank: int, deadline: float) -> str | None:
        """What a rank has said, or None if it says nothing until ``deadline`` (of :func:`time.monotonic`)."""
        key = f"{subject}/{rank}"
        seconds = max(0.01, deadline - time.monotonic())
        try:
            self._store.wait([key], datetime.timedelta(seconds=seconds))
        except torch.distributed.DistError:
            return None
        return self._store.get(key).decode()

    def ask_all(self, subject: str, deadline: float, ranks: Iterable[int] | None = None) -> dict[int, str]:
        """What the ranks have said until ``deadline``; those that said nothing are left out."""
        asked = range(self.world_size) if ranks is None else ranks
        answers = {rank: self.ask(subject, rank, deadline) for rank in asked}
        return {rank: text for rank, text in answers.items() if text is not None}


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
