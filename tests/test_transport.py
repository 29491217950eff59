from __future__ import annotations

import pytest
import torch

from hdnn_dist.exchange import Message, Round
from hdnn_dist.node import Exchange
from hdnn_dist.sparsity import BlockPattern
from hdnn_dist.transport import InProcess, drive

phase = Round("states", (Message(0, 1, 2),))
links = BlockPattern.of(2, [(0, 0), (1, 0), (1, 1)])  # 1 may hear from 0, not 0 from 1


def test_a_message_arrives_and_is_counted() -> None:
    transport = InProcess(links)
    mail = {(0, 1): torch.ones(2, 3)}
    assert transport.exchange(phase, mail, batch=3) == mail
    assert transport.sent == {(0, 1): 2 * 3 * 4}


@pytest.mark.parametrize(
    ("round_", "mail", "complaint"),
    [
        (phase, {}, "not the planned messages"),
        (phase, {(0, 1): torch.ones(3, 3)}, "sends"),
        (phase, {(0, 1): torch.ones(2, 4)}, "sends"),
        (Round("x", (Message(1, 0, 2),)), {(1, 0): torch.ones(2, 3)}, "not a link"),
    ],
)
def test_what_is_not_in_the_plan_is_not_sent(
    round_: Round, mail: dict[tuple[int, int], torch.Tensor], complaint: str
) -> None:
    with pytest.raises(AssertionError, match=complaint):
        InProcess(links).exchange(round_, mail, batch=3)


def test_agents_out_of_step_are_noticed() -> None:
    other = Round("pull", ())

    def agent(wanted: Round) -> Exchange[None]:
        yield wanted, {}

    with pytest.raises(AssertionError, match="is in"):
        drive({0: agent(phase), 1: agent(other)}, InProcess(links), 3)
