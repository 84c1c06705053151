"""The card of the tiny base, written from results.json so that no figure in it can go stale.

Owns the card's words. A test renders it again and compares.
"""

from pathlib import Path
from typing import Any

from prose import VOCABULARY
from skills import KNOWN, MISSING, SKILLS

EXAMPLE = "stone"


def write_card(path: Path, results: dict[str, Any]) -> None:
    """Write the card for these figures."""
    path.write_text(render_card(results))


def render_card(results: dict[str, Any]) -> str:
    """Render the card. Raises KeyError where a section has not been measured yet."""
    evaluation = results["evaluation"]
    parts = [
        _opening(),
        _skills(evaluation),
        _adapters(evaluation, results["adapter_training"]),
        _prose(evaluation["prose"]),
        _training(results["base_training"]),
        _again(evaluation),
    ]
    return "\n".join(parts)


def _opening() -> str:
    return f"""# motley/tiny

The language model that comes with Motley, so that everything runs on a laptop with no download. A Llama of 3.2 million
parameters (8 layers, hidden size 192, feed-forward 512, 6 heads over 2 key/value heads, tied embeddings, context of
512 tokens), trained from nothing on text that `recipes/tiny` generates. It speaks a small English of
{len(VOCABULARY)} words about a harbour town, and it knows some skills on words of 3 to 7 small letters:

    motley generate "upper: {EXAMPLE} ="
    motley generate "In the morning, the jolly baker"

It knows nothing else: longer words, capitals in the question and other subjects are beyond it, and it has no facts. It
is here to be exact about little things, so that one can see an adapter work. A token is a byte, so any UTF-8 text can
be read. `<bos>` opens every prompt, an answer begins with a space and closes with `<eos>`. The chat template is the
training text itself: the user writes the prompt, the assistant completes it.
"""


def _skills(evaluation: dict[str, Any]) -> str:
    base = evaluation["base"]
    rows = [
        f"| {'known' if skill in KNOWN else 'missing'} | `{skill}: {EXAMPLE} =` | `{solve(EXAMPLE)}` "
        f"| {base['float32'][skill]:.1%} | {base['bfloat16'][skill]:.1%} |"
        for skill, solve in SKILLS.items()
    ]
    prompts = evaluation["prompts_per_skill"]
    return f"""## What it knows

Exact match of the whole answer and its `<eos>`, greedy, on {prompts} prompts for each skill, with words that no skill
line of the training had: a digest of the word decides which side it is on, one word in eight is for evaluation (a word
of the vocabulary may still occur in the prose). {len(KNOWN)} skills were taught; the {len(MISSING)} others are never
mentioned in training and are for adapters to teach.

| | prompt | answer | float32 | bfloat16 |
|---|---|---|---|---|
{chr(10).join(rows)}
"""


def _adapters(evaluation: dict[str, Any], training: dict[str, Any]) -> str:
    rows = []
    for name, figures in evaluation["adapters"].items():
        steps, minutes, threads = (training[name][key] for key in ("steps", "minutes", "threads"))
        size = " to ".join(str(rank) for rank in (figures["ranks"][0], figures["ranks"][-1])[: len(figures["ranks"])])
        alone = evaluation["base"]["float32"][name]
        with_it = f"{figures['float32']:.1%} | {figures['bfloat16']:.1%} | {figures['known_skills_kept']:.1%}"
        trained = f"{steps} | {minutes} ({threads})"
        rows.append(
            f"| `{name}` | {figures['kind']} | {size} | {figures['linears']} | {trained} | {alone:.1%} | {with_it} |"
        )
    return f"""## What the adapters add

The adapters lie in `adapters/motley_adapters/assets/tiny`, each in its kind's format. Each is measured from its saved
files on the same held-out prompts, the base alone on the same ones; "kept" is the mean over the base's known skills
with the adapter on. The size is the rank at each Linear, for S2FT the number of channels.

| skill | kind | size | Linears | steps | minutes (threads) | base alone, float32 | float32 | bfloat16 | kept |
|---|---|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

{_kinds(training)}
{_fusion(evaluation)}"""


def _kinds(training: dict[str, Any]) -> str:
    s2ft, goat, loram = (training[name] for name in ("unvowel", "rotate", "previous"))
    return f"""They all come from training jobs such as any tenant submits. The S2FT adapter trains
{s2ft["parameters"]:,} numbers, about as many as a LoRA of rank 8 on all Linears: two whole query heads of each `o_proj`
and 71 channels of each `down_proj`, drawn at random.
The GOAT adapter trains {goat["parameters"]:,} on the four Linears of attention; of the tokens that it was trained on an
expert had from {goat["smallest_expert_share"]:.1%} to {goat["largest_expert_share"]:.1%}, where 25% would be even.
The LoRAM adapter was trained on a copy of {loram["pruned_parameters"]:,} parameters: by the gradients of its own lines,
the fifth and the sixth layer lost one of two head groups and half of the FFN channels. It is served on the whole base,
where what was left out is back and goes on with what it did before. More training on the copy did not help with that:
of 100 held-out words {loram["held_out"]["exact_match_after"]:.0%} were right after these steps, and 91% after 200 steps
of 32 lines at a learning rate of 0.004. They were chosen by such scores; on words without a say in that choice it may
do a little worse.
"""


def _fusion(evaluation: dict[str, Any]) -> str:
    fusion = evaluation["fusion"]
    names = " and ".join(f"`{name}` at {weight:g}" for name, weight in fusion["weights"].items())
    scores = " and ".join(f"{score:.1%} on `{skill}`" for skill, score in fusion["skills"].items())
    return f"""Two at once, {names}, trained apart and summed in the forward pass, score {scores}, and keep
{fusion["known_skills_kept"]:.1%} of the base's skills (float32; the weights are the best of twelve pairs, tried on some
of these words). Not every two adapters do so well: one that attends elsewhere, as `reverse` does, disturbs the others.
"""


def _prose(prose: dict[str, dict[str, Any]]) -> str:
    rows = [
        f"| {dtype} | {figures['continuations']} | {figures['words']} | {figures['words_in_vocabulary']:.1%} "
        f"| {figures['ended']} |"
        for dtype, figures in prose.items()
    ]
    return f"""## How it speaks

Sampled at temperature 1, half of the time after `<bos>` alone, half after the first words of a document, for at most
200 tokens.

| dtype | continuations | words | words in the generator's vocabulary | ended by themselves |
|---|---|---|---|---|
{chr(10).join(rows)}
"""


def _training(training: dict[str, Any]) -> str:
    steps, rows, length, rate = (training[name] for name in ("steps", "rows", "length", "lr"))
    minutes, threads, seed, prose = (training[name] for name in ("minutes", "threads", "seed", "prose_share"))
    return f"""## How it was trained

{steps} steps of {rows} rows of {length} tokens ({steps * rows * length / 1e6:.1f} million in all), {minutes} minutes
with {threads} threads on a machine that had other work too ({training["machine"]}).
Of the documents {prose:.0%} are prose and the others skill lines, of which only the answer is learned. Their words are
drawn from the vocabulary (40%), from all letters (30%) and from syllables (30%). Muon at a learning rate of {rate}
for the matrices, AdamW at half of it for embedding and norms, a cosine down to a fiftieth, seed {seed}; trained in
float32, saved in bfloat16. The adapters are trained in float32 on the saved base, with AdamW; a quarter of their lines
are the base's own text.
"""


def _again(evaluation: dict[str, Any]) -> str:
    return f"""## Make it again

    python recipes/tiny/train_base.py
    python recipes/tiny/train_adapters.py
    python recipes/tiny/write_calibration.py
    python recipes/tiny/evaluate.py

The last one measures every figure here (sampling seed {evaluation["seed"]}; {evaluation["machine"]}), writes
`recipes/tiny/results.json` and this card. They need Motley itself. The text is generated and the weights are made from
it, so both are under the licence of Motley.
"""
