"""Common questions: what a vision tower can learn to see, without a language model, from nothing but conversations.

    common = common_questions(rows)                    # {"What shape is it?": {"circle": 0, "square": 1, ...}, ...}
    batches = CommonAnswers(rows, common, images, batch_size=64, seed=0)
    next(batches)[0]                                   # pixel_values [N, 3, S, S], answers [N, questions]
"""

from collections import Counter
from collections.abc import Callable

import torch

from data.batches import IGNORE, Batches, InOrder
from data.image_cache import ImageCache
from data.llava import LlavaRow, LlavaRows
from processing_mllama import IMAGE_TOKEN

# What makes a question common: how many rows ask it, and how many different answers they give. At most so many questions.
LEAST_ASKED, MOST_ANSWERS, MOST_COMMON = 100, 50, 200


def questions_of(row: LlavaRow) -> list[tuple[str, str]]:
    """(question, answer) of all turns of a row with one image; of others none."""
    if len(row.images) != 1:
        return []
    said = [message["content"].replace(IMAGE_TOKEN, "").strip() for message in row.messages if message["role"] != "system"]
    return list(zip(said[::2], said[1::2], strict=True))


def common_questions(rows: LlavaRows, least_asked: int = LEAST_ASKED, most_answers: int = MOST_ANSWERS) -> dict[str, dict]:
    """Those that at least so many rows ask and at most so many different answers settle: question -> {answer: its number}."""
    found: dict[str, Counter] = {}
    for row in rows:
        for question, said in questions_of(row):
            found.setdefault(question, Counter())[said] += 1
    common = [q for q, n in found.items() if n.total() >= least_asked and 2 <= len(n) <= most_answers]
    common = sorted(common, key=lambda question: -found[question].total())[:MOST_COMMON]
    return {question: {said: i for i, said in enumerate(sorted(found[question]))} for question in common}


class CommonAnswers(InOrder):
    """Batches of the rows that have answers to common questions, each once an epoch. "answers", int64 [N, questions], are the
    answers' numbers, or IGNORE where a question was not asked."""

    def __init__(
        self, rows: LlavaRows, common: dict[str, dict[str, int]], images: ImageCache, batch_size: int, seed: int,
        grad_accum: int = 1, workers: int = 1, rank: int = 0, world_size: int = 1, all_ranks: Callable[[bool], bool] = bool,
    ):  # fmt: skip
        self.images, self.grad_accum, self.workers, self.all_ranks = images, grad_accum, workers, all_ranks
        self.columns = {question: column for column, question in enumerate(common)}
        self.common, self.rows = common, [row for row in rows if not common.keys().isdisjoint(dict(questions_of(row)))]
        self.order = Batches(len(self.rows), batch_size, seed, rank=rank, world_size=world_size)

    def __next__(self) -> list[dict]:
        """Raises ValueError where no image of a whole epoch can be read."""
        for _ in range(len(self.order) + 1):
            rows = [self.rows[i] for i in next(self.order).tolist()]
            self.images.load([row.images[0] for row in rows], self.workers)
            rows = [(row, pixels) for row in rows if (pixels := self.images[row.images[0]]) is not None]
            if self.all_ranks(len(rows) >= self.grad_accum):
                return [self.part(rows[k :: self.grad_accum]) for k in range(self.grad_accum)]
        bad = len(self.images.unreadable)
        raise ValueError(f"no batch is left: {bad} images cannot be read: check them, or pass --vision-steps 0")

    def part(self, rows: list[tuple[LlavaRow, torch.Tensor]]) -> dict[str, torch.Tensor]:
        answers = torch.full((len(rows), len(self.common)), IGNORE)
        for number, (row, _) in enumerate(rows):
            for question, said in questions_of(row):
                if question in self.common:
                    answers[number, self.columns[question]] = self.common[question][said]
        return {"answers": answers, "pixel_values": torch.stack([pixels[-1] for _, pixels in rows])}
