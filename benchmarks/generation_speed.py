"""How fast an ensemble of four writes, beside PEFT and beside a bound: the base alone writing four times the rows."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import record
from benchmarks.chat_runs import ADAPTERS, MEMBERS, spec_of

ROUNDS = 2
BOUND, PEFT = "the base alone, 4 x the rows", "PEFT, four calls"


class Writers:
    """One quantized base, four members on it in raylora's way and in PEFT's, and prompts to go on from."""

    def __init__(self, prompts: int, new_tokens: int) -> None:
        from raylora import registry
        from raylora.adapters.packed import stack
        from raylora.engine.generation.questions import question_of
        from raylora.engine.model.base import head_tensors
        from raylora.engine.model.member_tensors import initial_member
        from raylora.engine.model.packed_model import PackedModel
        from raylora.engine.run.plan_run import prepare
        from raylora.engine.run.session import TrainingSession
        from raylora.spec import build_spec

        self.new_tokens = new_tokens
        content = spec_of(tempfile.mkdtemp(), "tomi", "nf4", "LoRA", 1e-3, 0,
                          {"train": 8, "validation": 8, "test": prompts})
        prepared = prepare(build_spec(content))
        cpus, gpus = torch.get_num_threads(), prepared.plan.gpus_per_worker
        self.session = TrainingSession(prepared.spec, prepared.store, cpus=cpus, gpus=gpus)
        self.session.load()
        # As a user would write: what training must repeat bit for bit is not asked of either side here.
        torch.use_deterministic_algorithms(False)
        base = self.session.base
        adapter = registry.load("adapter", "lora").build(prepared.spec.adapter)
        members = []
        for plan in self.session.plans.values():
            member = initial_member(base, adapter, head_tensors(base), plan.stream("init"))
            generator = torch.Generator().manual_seed(plan.seed)
            for name, tensor in member.items():
                if name.endswith("lora_B"):  # trained members differ, and their B is not zero
                    tensor.normal_(0, 0.01, generator=generator)
            members.append({name: tensor.to(base.device) for name, tensor in member.items()})
        self.model, self.stacked = PackedModel(base, adapter, self.session.task), stack(members)
        self.prompts = [list(question_of(example).prompt) for example in self.session.sets.test.examples]
        self._inputs = base.tokenizer.pad({"input_ids": self.prompts}, padding_side="left", return_tensors="pt")

    def contenders(self) -> dict[str, Callable[[int], object]]:
        """Return by name what writes ``new_tokens`` to every prompt; PEFT's members are its own, of the same shapes."""
        from peft import LoraConfig, get_peft_model

        from raylora.engine.model.base import frozen_model

        base, spec = self.session.base, self.session.spec
        alone, _ = frozen_model(spec.base, self.session.task, base.device, base.dtype)
        under_peft, _ = frozen_model(spec.base, self.session.task, base.device, base.dtype)
        lora = ADAPTERS["LoRA"]
        config = LoraConfig(task_type="CAUSAL_LM", r=lora["rank"], lora_alpha=lora["alpha"], init_lora_weights=False,
                            target_modules=lora["target_modules"])
        peft_model = get_peft_model(under_peft, config, adapter_name="0")
        for member in range(1, MEMBERS):
            peft_model.add_adapter(str(member), config)
        alone.eval(), peft_model.eval()

        def four_calls(_: int) -> None:
            for member in range(MEMBERS):
                peft_model.set_adapter(str(member))
                self._generate(peft_model, 1)

        names = [str(member) for member in range(MEMBERS) for _ in self.prompts]
        return {
            "ensemble: one answer of four members": lambda _: self._decode(each_member=False),
            "four members, an answer each": lambda _: self._decode(each_member=True),
            PEFT: four_calls,
            "PEFT, four members in a batch": lambda _: self._generate(peft_model, MEMBERS, adapter_names=names),
            BOUND: lambda _: self._generate(alone, MEMBERS),
            "the base alone": lambda _: self._generate(alone, 1),
        }

    def _decode(self, each_member: bool) -> None:
        from raylora.engine.generation.decoder import Decoder, Sampling

        names = [str(number) for number in range(len(self.prompts))]
        sampling = Sampling(self.new_tokens, each_member=each_member)
        decoder = Decoder(self.model, self.stacked, self.prompts, names, sampling, [])
        assert sum(map(len, decoder.steps())) == self.new_tokens * len(self.prompts) * (MEMBERS if each_member else 1)

    @torch.no_grad()
    def _generate(self, model: Any, times: int, **more: Any) -> None:
        inputs = {name: tensor.to(self.session.base.device).repeat(times, 1) for name, tensor in self._inputs.items()}
        found = model.generate(**inputs, **more, do_sample=False, min_new_tokens=self.new_tokens,
                               max_new_tokens=self.new_tokens, pad_token_id=0)
        assert found.shape[1] == inputs["input_ids"].shape[1] + self.new_tokens


def measure(prompts: int, new_tokens: int) -> list[dict[str, Any]]:
    """Return a row per contender, rounds interleaved; tokens of the ensemble count once, whatever its members read."""
    writers = Writers(prompts, new_tokens)
    contenders = writers.contenders()
    times = record.interleaved(contenders, ROUNDS)
    own = {"PEFT, four calls", "PEFT, four members in a batch", "four members, an answer each", BOUND}
    rows = []
    for who, seconds in times.items():
        answers = prompts * (MEMBERS if who in own else 1)
        rows.append({
            "part": "speed", "who": who, "prompts": prompts, "new_tokens": new_tokens, "answers": answers,
            "prompt_tokens": sum(map(len, writers.prompts)), "dtype": str(writers.session.base.dtype),
            "device": writers.session.base.device.type, "s": statistics.median(seconds), "s_all": seconds,
            "tokens_per_s": answers * new_tokens / statistics.median(seconds),
            "four_calls_over_this": record.ratio(times[PEFT], seconds),
            "bound_over_this": record.ratio(times[BOUND], seconds),
        })
    return rows
