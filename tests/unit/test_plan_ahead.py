"""Plans for machines that are not here, of models whose weights are not here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from typer.testing import CliRunner

from raylora.cli.app import app
from raylora.engine.run.plan_ahead import plan_ahead
from raylora.errors import BaseError, PlacementError
from raylora.placement.cluster import read_cluster
from raylora.placement.inventory import Gpu
from raylora.spec import dump_spec, parse_spec

GB = 10**9
LLAMA_70B = {
    "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 8192, "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder with the configuration of a Llama of 70 billion parameters, and nothing else."""
    folder = tmp_path_factory.mktemp("llama-70b")
    transformers.LlamaConfig(architectures=["LlamaForCausalLM"], **LLAMA_70B).save_pretrained(folder)
    return str(folder)


def spec_of(
    base: str, time: int, members: int = 8, quantization: str = "nf4", placement: str = "{}",
    adapter: str = "{rank: 8, target_modules: [q_proj, v_proj]}",
) -> Any:
    return parse_spec(f"""
base: {{source: {base}, quantization: {quantization}}}
adapter: {adapter}
task: {{kind: language_modeling, max_length: {time}}}
data: {{train: {{files: [not-here.jsonl]}}}}
ensemble: {{members: {members}}}
evaluation: {{batch: 1}}
optimization: {{micro_batch: 1, steps: 10}}
placement: {placement}
""")


def test_a_base_of_70b_is_split_where_it_does_not_fit_whole(large: str) -> None:
    ahead = plan_ahead(spec_of(large, time=800), read_cluster("4x80GB"))
    plan = ahead.plan
    assert plan.summary().startswith("shard over 4: 1 worker(s), 2 member(s) per GPU"), plan.reasons
    assert plan.reasons[0].startswith("replicate does not fit: one member needs about")
    assert any("assumed: 32 CPUs" in reason for reason in plan.reasons)
    assert ahead.batch.tokens == 800 and any("have 800 tokens" in note for note in ahead.notes)
    # 70.6 billion weights: 4.127 bits each in the blocks, 16 in the two tables of 128256 x 8192
    assert plan.parts.base == pytest.approx(68.45e9 * 4.127 / 8 / 4, rel=0.01)
    assert plan.parts.embeddings == pytest.approx(2 * 128256 * 8192 * 2 / 4, rel=0.001)
    assert plan.parts.gathered == max(2 * plan.parts.base * 4 // 80, 128256 * 8192 * 2)
    assert plan.worker_bytes <= 0.8 * 80 * GB


def test_an_output_layer_in_parts_is_counted_so_and_named_where_a_whole_one_does_not_fit(large: str) -> None:
    table = 128256 * 8192 * 2
    whole, parts = (
        plan_ahead(spec_of(large, time=800, placement=f"{{strategy: shard, output_layer: {how}}}"),
                   read_cluster("4x80GB")).plan
        for how in ("whole", "parts")
    )
    two_blocks = 2 * (whole.parts.base * 4 // 80)
    assert whole.parts.gathered == table and parts.parts.gathered == pytest.approx(two_blocks, rel=0.01)
    assert whole.worker_bytes - parts.worker_bytes == whole.parts.gathered - parts.parts.gathered
    assert "the output layer is gathered in parts of 350.2 MB: as asked" in parts.reasons
    with pytest.raises(PlacementError, match=r"gathered would be 0.9 with placement.output_layer: parts"):
        plan_ahead(spec_of(large, time=800, placement="{strategy: shard}"), read_cluster("4x24GB"))
    with pytest.raises(PlacementError) as caught:
        plan_ahead(
            spec_of(large, time=800, placement="{strategy: shard, output_layer: parts}"), read_cluster("4x24GB")
        )
    assert "gathered would be" not in str(caught.value)


def test_shorter_rows_and_larger_devices_need_no_split(large: str) -> None:
    short = plan_ahead(spec_of(large, time=512), read_cluster("4x80GB")).plan
    assert (short.strategy, short.workers, len(short.packs)) == ("replicate", 4, 8)
    large_gpus = plan_ahead(spec_of(large, time=800), read_cluster("8x141GB")).plan
    assert (large_gpus.strategy, large_gpus.workers) == ("replicate", 8)
    two_nodes = plan_ahead(spec_of(large, time=800), read_cluster("2x4x80GB")).plan
    assert (two_nodes.ranks, two_nodes.workers) == (4, 2)


def test_what_fits_nowhere_says_what_needs_it(large: str) -> None:
    with pytest.raises(PlacementError, match=r"activations 5\d.*activations would be .* with placement.recompute"):
        plan_ahead(spec_of(large, time=2048), read_cluster("4x80GB"))
    with pytest.raises(PlacementError, match="one member needs about 1"):
        plan_ahead(spec_of(large, time=512, quantization="none"), read_cluster("1x80GB"))


def test_adapters_that_start_from_whole_weights_cannot_be_split(large: str) -> None:
    for placement in ("{strategy: shard}", "{}"):
        adapter = "{kind: lora_xs, rank: 8, target_modules: [q_proj]}"
        spec = spec_of(large, time=1200, placement=placement, adapter=adapter)
        with pytest.raises(PlacementError, match="starts from the base's whole weights"):
            plan_ahead(spec, read_cluster("4x80GB"))


def test_the_command_needs_neither_weights_nor_cluster(large: str, tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(dump_spec(spec_of(large, time=800)))
    done = CliRunner().invoke(app, ["plan", str(path), "--cluster", "4x80GB", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["strategy"] == "shard" and found["worker_bytes"] == sum(found["parts"].values())
    said = CliRunner().invoke(app, ["plan", str(path), "--cluster", "4x80GB"])
    assert "shard over 4" in said.stdout and "activations" in said.stdout
    both = CliRunner().invoke(app, ["plan", str(path), "--cluster", "4x80GB", "--local"])
    assert both.exit_code == 2


def test_a_rate_gives_a_pace_and_that_of_the_other_strategy(large: str) -> None:
    whole = plan_ahead(spec_of(large, time=512), read_cluster("4x80GB"), tflops=200)
    ours, other, rates = whole.notes[-3:]
    # 4 FLOP for each of 69.5 billion weights (blocks and output layer) and 512 tokens at 200e12 per second
    assert ours.startswith("replicate: about 1,813 tokens/s; 1.1 s a step (products 0.71, weights 0.42)")
    # 35.3 GB, three quarters of them twice through 32 GB per second
    assert other.startswith("shard instead: about") and "gathering 1.7" in other
    assert rates.startswith("at 200 TFLOP/s and 1,500 GB/s per worker, as given")
    assert any(reason.startswith("shard over 4 instead would take 1.") for reason in whole.plan.reasons)
    split = plan_ahead(spec_of(large, time=800), read_cluster("4x80GB"), tflops=200)
    assert split.notes[-2].startswith("replicate instead: not possible: placement: one member needs")
    supposed = plan_ahead(spec_of(large, time=512), read_cluster("4x80GB"))
    assert "supposed" in supposed.notes[-1]


def test_long_rows_fit_where_blocks_are_run_again(large: str) -> None:
    ahead = plan_ahead(spec_of(large, time=2048, placement="{recompute: true}"), read_cluster("4x80GB"))
    assert ahead.plan.summary().startswith("replicate: 4 worker(s), 2 member(s) per GPU, 52"), ahead.plan.summary()


def test_a_run_still_needs_weights(large: str) -> None:
    from raylora.engine.run.plan_run import prepare

    with pytest.raises(BaseError, match="no safetensors"):
        prepare(spec_of(large, time=800))


def test_data_that_is_there_is_read(make_spec: Callable[..., Any]) -> None:
    ahead = plan_ahead(make_spec(task__max_length=512), read_cluster("1x16GB"))
    assert not any("could not be read" in note for note in ahead.notes)
    assert ahead.batch.time < 100  # a review's sentence is shorter than it may be


def test_a_file_describes_nodes_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("""
network_gbit_s: 100
nodes:
  - {name: large, count: 2, cpus: 64, memory: 512GB, gpus: [{memory: 80GB, count: 4}]}
  - {name: mixed, cpus: 16, memory: 64GiB, gpus: [{memory: 24GB}, {memory: 48GB, share: 0.5}]}
  - {name: cores, cpus: 32, memory: 128GB}
""")
    found = read_cluster(str(path))
    assert [node.name for node in found.nodes] == ["large-0", "large-1", "mixed", "cores"]
    assert found.gpus == 10 and found.cpus == 176 and found.network_gbit_s == 100
    assert found.nodes[2].gpus == (Gpu(24 * GB), Gpu(48 * GB, share=0.5))
    assert found.nodes[2].gpus[1].free_bytes == 24 * GB and found.nodes[2].memory_bytes == 64 * 2**30


@pytest.mark.parametrize(("text", "says"), [
    ("4x80", "is no file"), ("4x80XB", "is no size"), ("0x80GB", "has no GPU"), ("nowhere.yaml", "is no file"),
])
def test_a_cluster_that_is_not_one_is_refused(text: str, says: str) -> None:
    with pytest.raises(PlacementError, match=says):
        read_cluster(text)


@pytest.mark.parametrize(("text", "says"), [
    ("nodes: []", "nodes: "), ("nodes: [{cpus: 4, memory: 8GB, gpu: 3}]", "nodes.0.gpu"), ("a: [", "is not YAML"),
    ("nodes: [{cpus: 4, memory: lots}]", "'lots' is no size"), ("- 4", "problem"),
])
def test_a_file_that_is_no_cluster_is_refused(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(PlacementError) as caught:
        read_cluster(str(path))
    assert says in str(caught.value)
