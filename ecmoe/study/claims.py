"""The paper's claims: what they say, where, what would refute them, and which notebook looks.

Zhou et al., "Mixture-of-Experts with Expert Choice Routing", NeurIPS 2022 (arXiv 2202.09368).
"""

from __future__ import annotations

from typing import NamedTuple


class Claim(NamedTuple):
    """A claim of the paper; `paper`: its figure in short; `proxy`: by what else we judge it."""

    id: str
    text: str
    paper: str
    where: str
    refuted_by: str
    notebook: str
    proxy: str = ""


_LIST = [
    Claim(
        "C1",
        "EC-CF2 reaches GShard top-2's perplexity in less than half the steps, and is better than "
        "Switch top-1, which is worse than top-2",
        "less than 0.5 x the steps (8B/64E)",
        "4.2, Fig. 2a",
        "the steps EC-CF2 needs for GShard's loss, over GShard's own, are above 1; or 1 can't be ruled out, and 0.5 can",
        "01_convergence",
    ),
    Claim(
        "C2",
        "A GShard top-2 step is 20% slower than an EC-CF2 step",
        "1.2 x the time of a step",
        "4.2",
        "a GShard top-2 step takes less time than an EC-CF2 step; or as much can't be ruled out, and 1.2 x can",
        "08_step_time",
        "other hardware than the paper's TPU v4, another implementation",
    ),
    Claim(
        "C3",
        "Perplexity falls as experts grow from 16 to 128 at fixed expert size, and EC is below GShard top-2 at each",
        "falls at every doubling; EC below at each",
        "4.3, Fig. 2b",
        "more experts do not lower the loss, or GShard top-2 is below EC at some number of experts",
        "06_number_of_experts",
    ),
    Claim(
        "C4",
        "Fine-tuned on 11 tasks, EC is ahead of GShard top-2, Switch top-1 and the dense model",
        "84.0 against 82.2 and 78.4 (64E); +3.4 over dense (8B)",
        "4.4, Tables 2 and 3",
        "the 11-task average of EC is not above those of the others",
        "07_fine_tuning",
    ),
    Claim(
        "C5",
        "Capping the experts of a token at 2 costs quality; a cap of 3 does not",
        "83.2 +- 0.4 (cap 2), 84.0 +- 0.4 (cap 3), 84.0 +- 0.2 (none)",
        "4.5, Table 4",
        "EC-CAP2 is not worse than EC-CF2",
        "04_capped_experts",
        "judged by validation loss; the paper's figure is fine-tuning accuracy",
    ),
    Claim(
        "C6",
        "Hash routing is worse than expert choice",
        "81.3 against 84.0",
        "4.6, Table 4",
        "hash routing is not worse than EC-CF2",
        "05_other_routers",
        "judged by validation loss; the paper's figure is fine-tuning accuracy",
    ),
    Claim(
        "C7",
        "Most tokens go to one or two experts, 23% to three or four, about 3% to more than four",
        "most; 23%; about 3%",
        "4.5, Fig. 3",
        "one or two experts are not what most tokens get, or far more than 3% get above four",
        "04_capped_experts",
    ),
    Claim(
        "C8",
        "Training perplexity: CF2 < CF1 < CF0.5, and both CF1 and CF0.5 are below Switch top-1",
        "in that order",
        "4.7, Fig. 4a",
        "a neighbouring pair is in the other order",
        "03_capacity_factor",
        "judged by validation loss; the paper's figure is training perplexity",
    ),
    Claim(
        "C9",
        "EC beats dense pre-training in perplexity and in convergence time",
        "lower perplexity, sooner",
        "4.8, Fig. 4b",
        "the dense twin's loss is not above EC's, or it gets there sooner",
        "01_convergence",
    ),
    Claim(
        "C10",
        "Token choice is unbalanced: some experts are asked for 20 to 40% above their capacity; "
        "auxiliary losses help only in part",
        "20 to 40% over capacity",
        "3.1, blog post",
        "the fullest expert's demand stays within 20% of an equal share",
        "02_load_balance",
    ),
    Claim(
        "L1",
        "Limitation: the top-k over tokens looks at future tokens; separate groups for the tokens "
        "of one sequence would help",
        "proposed, not tested",
        "6",
        "routed causally, a model trained on the paper's pool, the batch, or on pools of one sequence loses nothing; or one "
        "trained on pools by position (each token of a sequence in a group of its own) loses as much, or is no better then",
        "09_causality",
    ),
    Claim(
        "L2",
        "Limitation: very small serving batches; a global top-k with caps would help",
        "proposed, not tested",
        "6",
        "a single sequence, routed on its own by plain expert choice, loses nothing; or a global top-k "
        "wins nothing back",
        "09_causality",
    ),
]
CLAIMS: dict[str, Claim] = {claim.id: claim for claim in _LIST}
