"""The choice of the next token of every sequence in a step, and the log-probabilities that go with it.

Stateless: a token is a function of its row's logits, its parameters and its tokens so far, so it is the same alone,
in a batch and after a preemption. Knows logits and sampling parameters, nothing of requests, blocks or text. Runs on
the engine thread.

Order, that of transformers' generate: penalties and biases (penalties.py), then greedy; or temperature, top_k, top_p,
min_p, and one draw (distribution.py, philox.py). vLLM differs in that it adds logit_bias and forbids early ends
before the penalties, and applies min_p before top_k and top_p.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from motley_server.engine.distribution import draw, first_argmax, has_ranked_filter, ranked
from motley_server.engine.penalties import SamplingRow, edit_logits, has_edits
from motley_server.engine.philox import token_uniform
from motley_server.engine.types import TokenLogprobs
from motley_server.errors import InternalError

__all__ = ["SampledToken", "Sampler", "SamplingRow", "score_rows"]

_CPU_CHUNK_ELEMENTS = 2**19  # temporaries of a few MB stay in cache; far larger ones are mapped afresh at every step
_BAD_LOGITS = "the model's output holds NaN or infinity, or forbids every token"


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One row's outcome: a token, or in `error` why there is none (`token_id` is then meaningless)."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    error: str | None = None


class Sampler:
    """Choose tokens, one a row."""

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
        """Return the next token of each row.

        Semantics: temperature 0 takes the greatest edited logit, lowest id first; log-probabilities are of the logits
        as given. A row whose greatest edited logit is not finite gets an `error`; its neighbours do not notice.
        Shapes: logits [S, V] float32, one row for each of `rows`; read only.
        """
        tokens, is_sound = [0] * len(rows), [False] * len(rows)
        for chunk in (chunk for indices in _alike(rows) for chunk in _chunks(indices, logits)):
            picked = _pick(_select(logits, chunk), [rows[index] for index in chunk])
            for index, token, flag in zip(chunk, *picked, strict=True):
                tokens[index], is_sound[index] = token, flag
        wanting = [index for index, row in enumerate(rows) if is_sound[index] and row.params.logprobs is not None]
        counts = [rows[index].params.logprobs or 0 for index in wanting]
        entries = dict(
            zip(wanting, _logprobs(logits, wanting, [tokens[index] for index in wanting], counts), strict=True)
        )
        return [
            SampledToken(token, entries.get(index)) if is_sound[index] else SampledToken(token, error=_BAD_LOGITS)
            for index, token in enumerate(tokens)
        ]


def score_rows(logits: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """Return the log-probability of a given token in each row, and the `num_top` likeliest.

    Shapes: logits [S, V] float32, one row for each of `token_ids`; read only.
    Raises: InternalError (reason=BAD_LOGITS) if any row holds NaN or +infinity.
    """
    if len(token_ids) and not bool(first_argmax(logits)[0].isfinite().all()):
        raise InternalError(_BAD_LOGITS, reason="BAD_LOGITS")
    return list(_logprobs(logits, list(range(len(token_ids))), token_ids, [num_top] * len(token_ids)))


def _alike(rows: Sequence[SamplingRow]) -> list[list[int]]:
    """Group the rows that take the same steps, so that none pays for another's."""
    groups: dict[tuple[bool, ...], list[int]] = {}
    for index, row in enumerate(rows):
        is_greedy = row.params.temperature == 0.0
        kind = (is_greedy, not is_greedy and has_ranked_filter(row.params), has_edits(row))
        groups.setdefault(kind, []).append(index)
    return list(groups.values())


def _chunks(indices: list[int], logits: Tensor) -> Iterator[list[int]]:
    is_cpu = logits.device.type == "cpu"
    size = max(1, _CPU_CHUNK_ELEMENTS // logits.shape[1]) if is_cpu else max(1, len(indices))
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def _select(logits: Tensor, indices: list[int]) -> Tensor:
    """Return some rows, named in rising order, without a copy where they lie together."""
    if indices[-1] - indices[0] == len(indices) - 1:
        return logits[indices[0] : indices[-1] + 1]
    return logits.index_select(0, torch.tensor(indices, device=logits.device))


def _pick(values: Tensor, rows: Sequence[SamplingRow]) -> tuple[list[int], list[bool]]:
    """Choose a token for rows that are alike; return the tokens and which rows had a finite maximum."""
    if has_edits(rows[0]):
        values = values.clone(memory_format=torch.contiguous_format)
        edit_logits(values, rows)
    maximum, tokens = first_argmax(values)
    is_sound = maximum.isfinite()
    if rows[0].params.temperature == 0.0:
        return tokens.tolist(), is_sound.tolist()
    flags = is_sound.tolist()
    if not all(flags):
        values = values.masked_fill(~is_sound.unsqueeze(1), 0.0)
    uniforms = [token_uniform(row.params.seed, row.candidate, row.num_output_tokens) for row in rows]
    return draw(values, [row.params for row in rows], uniforms).tolist(), flags


def _logprobs(
    logits: Tensor, indices: list[int], token_ids: Sequence[int], counts: Sequence[int]
) -> Iterator[TokenLogprobs]:
    done = 0
    for chunk in _chunks(indices, logits):
        values = _select(logits, chunk)
        chosen = token_ids[done : done + len(chunk)]
        width = max(counts[done : done + len(chunk)])
        logprobs = values.log_softmax(-1)
        own = logprobs.gather(1, torch.tensor(chosen, device=logits.device).unsqueeze(1)).squeeze(1).tolist()
        top_ids = ranked(values, width)[1] if width else torch.empty(len(chunk), 0, dtype=torch.int64)
        tops = zip(top_ids.tolist(), logprobs.gather(1, top_ids.to(logits.device)).tolist(), strict=True)
        for token_id, logprob, count, (ids, values_of) in zip(chosen, own, counts[done:], tops, strict=False):
            yield TokenLogprobs(token_id, logprob, tuple(zip(ids[:count], values_of[:count], strict=True)))
        done += len(chunk)
