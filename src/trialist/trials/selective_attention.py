"""Does selective attention model text better at equal training tokens?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from trialist.engine.context import Context
from trialist.engine.contract import Arm, Claim, Endpoint, Outcome, Tuning
from trialist.trials._language_model import arm_remarks, attention_arms
from trialist.trials._text import bits_per_byte, load_rows
from trialist.trials._text_trial import AnyModelTextTrial

LEARNING_RATES = (2e-3, 4e-3, 8e-3)


@dataclass(frozen=True)
class SelectiveAttentionTrial(AnyModelTextTrial):
    """Does selective attention model text better than standard attention at equal training tokens?"""

    claim = Claim(
        statement="At equal training tokens, selective attention models text better than standard attention, "
        "also than standard attention with twice the heads.",
        source="arXiv:2410.02703",
        reported="language modelling on C4 as good as that of transformers with about twice the heads and attention "
        "parameters, for models up to about 1B parameters",
        endpoint=Endpoint("bits_per_byte", unit="bits per byte", better="lower", margin=0.02, floor=4.5),
    )
    tuning = Tuning(tries=3, metric=Endpoint("validation_bits_per_byte", unit="bits per byte", better="lower"))
    presets = {
        "demo": dict(steps=180, batch=4, test_bytes=16_384, seeds=3, about="under 5 minutes on 2 cores"),
        "tiny": dict(seeds=3, about="about 10 minutes a setting on 2 cores"),
        "real": dict(
            model="smollm2-135m-instruct", length=512, batch=2, steps=150, test_bytes=131_072, seeds=3,
            about="continued training of a given model, hours on 2 cores",
        ),
        "gpu": dict(
            data="enwik8", tokenizer="bpe-4096", layers=8, width=512, heads=8, length=1024, batch=32, steps=3_000,
            test_bytes=1_000_000, dtype="bfloat16", seeds=3, about="an hour on one GPU",
        ),
        "paper": dict(
            data="allenai/c4:en", tokenizer="bpe-8192", layers=12, width=768, heads=12, length=512, batch=256, steps=524_288,
            test_bytes=10_000_000, dtype="bfloat16", seeds=3, about="the paper's setting, many GPU days",
        ),
    }  # fmt: skip
    usage = (
        "from transformers import AutoModelForCausalLM\n"
        "from trialist.models import enable_selective_attention\n"
        'model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M")\n'
        "enable_selective_attention(model)  # then continue training: the heads must learn to select"
    )

    def remarks(self) -> tuple[str, ...]:
        return (*super().remarks(), *arm_remarks(self.model))

    def arms(self) -> Iterator[Arm]:
        return attention_arms(
            self.model, ("text", "shuffled"), learning_rate=self.learning_rate, learning_rates=LEARNING_RATES
        )

    def run(self, arm: Arm, seed: int, context: Context) -> Outcome:
        folder, tokenizer = self.prepared(context, shuffled=arm.setting == "shuffled")
        model = self.new_model(arm, context, tokenizer)
        outcome, last = self.fit_text(
            model, folder, context, learning_rate=arm["learning_rate"], part="test", evaluations=5, tokenizer=tokenizer
        )
        if outcome.diverged is not None:
            return outcome
        validation = bits_per_byte(model, *load_rows(folder, "validation"), batch=self.batch)
        outcome = dataclasses.replace(outcome, metrics={**last, "validation_bits_per_byte": validation})
        return self.hand_over(outcome, model, tokenizer, context, batch=self.batch)
