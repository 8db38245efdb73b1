"""One arm of benchmarks/throughput.py: an engine, loaded once, that answers what it is told to.

    python benchmarks/throughput_arm.py ARM SETTINGS.json

Runs with the interpreter that has the arm's engine, prints `ready`, then reads one line of JSON a
pass from stdin ({"ids": [[…]], "seeds": […], "order": […]}: prompts of the whole workload, and
which of them to answer, in which order) and prints one of JSON for it: seconds and answers. Nothing
is kept from one pass to the next: prefix caches are emptied.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

EOS = 3
"""End marker of the models that workloads.py makes."""
STATIC_BATCH = 16


class Arm:
    """What all arms have: settings of the workload, `answer`, and a way to forget."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.new_tokens = int(settings["max_new_tokens"])
        self.temperature = float(settings["temperature"])
        self.prefilled: int | None = None
        """Prompt tokens computed in the last pass, where the engine says."""

    def answer(self, ids: list[list[int]], seeds: list[int | None]) -> list[list[int]]:
        """Generated ids of each prompt, in the order given, without the end marker."""
        raise NotImplementedError

    def forget(self) -> None:
        """Empty caches, outside the time that counts."""

    def configure(self, changes: dict[str, Any]) -> None:
        self.temperature = float(changes.get("temperature", self.temperature))


# ---- transformers


class Plain(Arm):
    """`generate`: one by one, or in batches of like lengths (`batch` above 1)."""

    batch = 1

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        import torch
        import transformers

        self.torch = torch
        torch.set_num_threads(settings["threads"])
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            settings["model"], dtype=torch.float32, local_files_only=True
        ).eval()

    def answer(self, ids: list[list[int]], seeds: list[int | None]) -> list[list[int]]:
        by_length = sorted(range(len(ids)), key=lambda n: -len(ids[n])) if self.batch > 1 else None
        places = list(by_length or range(len(ids)))
        found: list[list[int]] = [[] for _ in ids]
        self.prefilled = 0
        for start in range(0, len(places), self.batch):
            part = places[start : start + self.batch]
            for place, tokens in zip(part, self._generate([ids[n] for n in part]), strict=True):
                found[place] = tokens
        return found

    def _generate(self, prompts: list[list[int]]) -> list[list[int]]:
        torch = self.torch
        width = max(map(len, prompts))
        assert self.prefilled is not None
        self.prefilled += width * len(prompts)
        padded = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        how: dict[str, Any] = {"do_sample": self.temperature > 0}
        if self.temperature:
            how |= {"temperature": self.temperature, "top_k": 0}
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=padded,
                attention_mask=mask,
                max_new_tokens=self.new_tokens,
                eos_token_id=EOS,
                pad_token_id=0,
                **how,
            )
        return [until_end(row) for row in out[:, width:].tolist()]


class Static(Plain):
    batch = STATIC_BATCH


def until_end(tokens: Sequence[int]) -> list[int]:
    tokens = list(tokens)
    return tokens[: tokens.index(EOS)] if EOS in tokens else tokens


# ---- vLLM as its documentation shows it


class RawVllm(Arm):
    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        import os

        # On the CPU a process of its own for the engine takes memory and is no faster.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        self.llm = LLM(
            settings["model"],
            dtype="float32",
            enforce_eager=True,
            max_model_len=settings["max_model_len"],
            kv_cache_memory_bytes=settings["kv_bytes"],
        )

    def answer(self, ids: list[list[int]], seeds: list[int | None]) -> list[list[int]]:
        from vllm import SamplingParams

        params = [
            SamplingParams(
                max_tokens=self.new_tokens,
                temperature=self.temperature,
                seed=seed,
                stop_token_ids=[EOS],
            )
            for seed in seeds
        ]
        prompts: Any = [{"prompt_token_ids": one} for one in ids]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        cached = sum(output.num_cached_tokens or 0 for output in outputs)
        self.prefilled = sum(map(len, ids)) - cached
        return [until_end(output.outputs[0].token_ids) for output in outputs]

    def forget(self) -> None:
        assert self.llm.reset_prefix_cache()


# ---- ours


class Ours(Arm):
    """An engine of ragfleet through its seam, fed as the worker feeds it."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.engines: dict[float, Any] = {}
        self._engine()

    def _engine(self) -> Any:
        """Sampling is fixed for an engine: one for greedy, one for each temperature."""
        if self.temperature not in self.engines:
            for engine in self.engines.values():
                engine.close()
            self.engines = {self.temperature: self._make()}
        return self.engines[self.temperature]

    def configure(self, changes: dict[str, Any]) -> None:
        super().configure(changes)
        self._engine()

    def _make(self) -> Any:
        from ragfleet.engines.make import make_engine
        from ragfleet.engines.protocol import EngineSpec, PromptSettings, SamplingParams

        vllm = self.settings["arm"] == "ours on vLLM"
        options = {"kv_cache_memory_bytes": self.settings["kv_bytes"]} if vllm else {}
        engine = make_engine(
            EngineSpec(
                model_dir=Path(self.settings["model"]),
                sampling=SamplingParams(
                    max_new_tokens=self.new_tokens, temperature=self.temperature
                ),
                prompts=PromptSettings(system_prompt=""),
                num_threads=self.settings["threads"],
                max_model_len=self.settings["max_model_len"],
                engine_options=options,
            ),
            "vllm" if vllm else "transformers",
        )
        print(engine.start(), file=sys.stderr)
        return engine

    def answer(self, ids: list[list[int]], seeds: list[int | None]) -> list[list[int]]:
        from ragfleet.engines.protocol import Completion, Prepared, Request

        engine = self._engine()
        waiting = [
            Prepared(
                request=Request(
                    key=number.to_bytes(16, "big"),
                    query="",
                    context="",
                    retrieval_method=None,
                    record={},
                    seed=seed,
                ),
                prompt="",
                token_ids=one,
            )
            for number, (one, seed) in enumerate(zip(ids, seeds, strict=True))
        ]
        before = prefilled_of(engine)
        waiting.reverse()
        answers: dict[bytes, list[int]] = {}
        while len(answers) < len(ids):
            while waiting and engine.has_room(waiting[-1]):
                engine.submit(waiting.pop())
            for outcome in engine.step(1.0):
                assert isinstance(outcome, Completion), outcome
                answers[outcome.key] = list(outcome.token_ids)
        after = prefilled_of(engine)
        self.prefilled = None if before is None or after is None else after - before
        return [answers[number.to_bytes(16, "big")] for number in range(len(ids))]

    def forget(self) -> None:
        engine = self._engine()
        if self.settings["arm"] == "ours on vLLM":
            assert engine._llm.reset_prefix_cache()
        else:
            assert not engine._loop._scheduler.take_back(), "something was still running"


def prefilled_of(engine: Any) -> int | None:
    """Prompt tokens computed since the start, where the engine counts them."""
    if hasattr(engine, "num_cached_tokens"):
        return int(engine.num_prompt_tokens - engine.num_cached_tokens)
    scheduler = getattr(engine._loop, "_scheduler", None)
    return None if scheduler is None else int(scheduler.read_tokens)


class MatrixProduct(Arm):
    """As much work as there are requests, whatever they are: what the machine can do at most."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        import torch

        torch.set_num_threads(settings["threads"])
        self.torch = torch
        self.factors = torch.randn(1024, 1024), torch.randn(1024, 1024)

    def answer(self, ids: list[list[int]], seeds: list[int | None]) -> list[list[int]]:
        for _ in range(50 * len(ids)):
            self.torch.mm(*self.factors)
        return [[] for _ in ids]


ARMS: dict[str, Callable[[dict[str, Any]], Arm]] = {
    "naive": Plain,
    "static": Static,
    "ours on transformers": Ours,
    "raw vLLM": RawVllm,
    "ours on vLLM": Ours,
    "matrix product": MatrixProduct,
}


def measure_limits(threads: int) -> dict[str, float]:
    """What this machine can do: fp32 matrix product and copy, the best of some."""
    import torch

    torch.set_num_threads(threads)

    def best_s(call: Callable[[], Any], times: int) -> float:
        seconds = []
        for _ in range(times):
            started = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    gflops = 2 * 2048**3 / best_s(lambda: torch.mm(a, b), 10) / 1e9
    source, target = torch.empty(64 << 20), torch.empty(64 << 20)
    gbytes = 2 * source.nbytes / best_s(lambda: target.copy_(source), 5) / 1e9
    return {"gflops": gflops, "copy_gbytes_per_s": gbytes}


def main() -> None:
    name, settings_file = sys.argv[1:]
    settings = {**json.loads(Path(settings_file).read_text()), "arm": name}
    if name == "limits":
        print(json.dumps(measure_limits(settings["threads"])))
        return
    said = sys.stdout
    sys.stdout = sys.stderr  # whatever a library prints
    arm = ARMS[name](settings)
    print(json.dumps({"ready": True}), file=said, flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        arm.configure(task)
        ids = [task["ids"][n] for n in task["order"]]
        seeds = [task["seeds"][n] for n in task["order"]]
        arm.forget()
        started = time.perf_counter()
        answers = arm.answer(ids, seeds)
        seconds = time.perf_counter() - started
        result = {"seconds": seconds, "prefilled": arm.prefilled, "answers": answers}
        print(json.dumps(result), file=said, flush=True)


if __name__ == "__main__":
    main()
