"""The parity command on recorded tensors, and against a naive implementation at other sizes."""

from __future__ import annotations

import cmath
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from longlive_opt.errors import UserError
from longlive_opt.models.dit import CausalDiT
from longlive_opt.parity.__main__ import main
from longlive_opt.parity.comparison import TARGET
from longlive_opt.parity.directory import check_directory
from longlive_opt.parity.transformer import dit_config

GOLDEN = Path(__file__).parent / "golden"
COMPANIONS = ("manifest.json", "stream_weights.safetensors", "stream_inputs.safetensors")


pytestmark = pytest.mark.usefixtures("one_thread")


def golden_with(folder: Path, *names: str) -> Path:
    """A parity folder with these files of `golden` alone."""
    for name in names:
        (folder / name).symlink_to(GOLDEN / name)
    return folder


@pytest.mark.parametrize("case", ["dit_forward", "scheduler", "stream", "switch_global_sink_true",
                                  "switch_global_sink_false", "infinity_switch_global_sink_true", "t5"])
def test_case_reproduces_the_recording(tmp_path, case):
    """Any slip in embedding, modulation, RoPE, cache, roll, recache or schedule."""
    checked, = check_directory(golden_with(tmp_path, *COMPANIONS, f"{case}.safetensors"))
    assert checked.name == case and checked.tensors > 0
    assert checked.error <= TARGET, str(checked)


def test_whole_folder_passes(capsys):
    """The command that the README promises must pass on the folder that the repository carries."""
    assert main([str(GOLDEN)]) == 0
    report = capsys.readouterr().out
    assert "FAIL" not in report
    assert all(f"ok   {name} " in report for name in ("vae", "stream", "keys_dit", "keys_lora"))


def test_perturbed_weight_fails(tmp_path, capsys):
    """A comparison that compares nothing, or a limit so wide that a wrong weight passes."""
    folder = golden_with(tmp_path, "manifest.json", "stream_inputs.safetensors", "dit_forward.safetensors",
                         "stream.safetensors", "scheduler.safetensors")
    weights = load_file(GOLDEN / "stream_weights.safetensors")
    weights["blocks.2.self_attn.v.weight"][5, 7] += 0.1
    save_file(weights, folder / "stream_weights.safetensors")
    assert main([str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [
        ["FAIL", "dit_forward"], ["ok", "scheduler"], ["FAIL", "stream"]]
    assert "failed: ['dit_forward', 'stream']" in lines[-1]


@pytest.mark.parametrize("spoil", [lambda t: t[:, :-3], lambda t: torch.full_like(t, torch.nan)])
def test_wrong_shape_or_nan_in_the_recording_fails(tmp_path, spoil):
    """A NaN compares false with every limit, and other shapes broadcast: both would pass for equal."""
    folder = golden_with(tmp_path, *COMPANIONS)
    recorded = load_file(GOLDEN / "stream.safetensors")
    recorded["latents"] = spoil(recorded["latents"]).contiguous()
    save_file(recorded, folder / "stream.safetensors")
    assert main([str(folder)]) == 1


def missing_folder(folder: Path) -> None:
    folder.rmdir()


def missing_manifest(folder: Path) -> None:
    golden_with(folder, "scheduler.safetensors")


def manifest_without_configs(folder: Path) -> None:
    golden_with(folder, "scheduler.safetensors")
    (folder / "manifest.json").write_text('{"stream": {}}')


def manifest_that_is_a_list(folder: Path) -> None:
    golden_with(folder, "scheduler.safetensors")
    (folder / "manifest.json").write_text("[1]")


def no_case(folder: Path) -> None:
    golden_with(folder, *COMPANIONS)


def missing_companion(folder: Path) -> None:
    golden_with(folder, "manifest.json", "stream_inputs.safetensors", "stream.safetensors")


def truncated_file(folder: Path) -> None:
    golden_with(folder, *COMPANIONS)
    (folder / "stream.safetensors").write_bytes((GOLDEN / "stream.safetensors").read_bytes()[:5000])


def no_safetensors(folder: Path) -> None:
    golden_with(folder, *COMPANIONS)
    (folder / "stream.safetensors").write_bytes(b"not a tensor file")


def missing_tensor(folder: Path) -> None:
    golden_with(folder, *COMPANIONS)
    save_file({"prompt": torch.zeros(1)}, folder / "stream.safetensors")


def missing_size(folder: Path) -> None:
    manifest = json.loads((GOLDEN / "manifest.json").read_text())
    del manifest["configs"]["stream"]["window"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    golden_with(folder, *COMPANIONS[1:], "stream.safetensors")


def weights_of_another_size(folder: Path) -> None:
    weights = load_file(GOLDEN / "stream_weights.safetensors")
    del weights["head.head.bias"]
    save_file(weights, folder / "stream_weights.safetensors")
    golden_with(folder, "manifest.json", "stream_inputs.safetensors", "stream.safetensors")


@pytest.mark.parametrize("make, says", [
    (missing_folder, "manifest.json"), (missing_manifest, "manifest.json"),
    (manifest_without_configs, "configs"),
    (manifest_that_is_a_list, "manifest.json"), (no_case, "no file of a known case"),
    (missing_companion, "stream_weights.safetensors"),
    (truncated_file, "stream"), (no_safetensors, "stream"), (missing_tensor, "latents"),
    (missing_size, "window"),
    (weights_of_another_size, "head.head.bias"),
])
def test_unusable_folder_is_one_line_and_exit_2(tmp_path, capsys, make, says):
    """A traceback, or a green run over a folder in which nothing could be compared."""
    make(tmp_path)
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and says in error


def test_library_raises_user_error(tmp_path):
    """`check_directory` is called by others, too; they catch UserError."""
    with pytest.raises(UserError, match="manifest.json"):
        list(check_directory(tmp_path))


# The naive implementation. It shares no code with the library: lists of frames for slots, explicit complex
# numbers for RoPE, softmax written out, float64 throughout.


class Naive:
    """SPEC 2 and 4 to 6, batch 1. `slots[layer]` is a list of W (key, value), one latent frame each."""

    def __init__(self, sizes: dict, weights: dict[str, Tensor], infinity: bool):
        self.sizes, self.infinity = sizes, infinity
        self.weights = {name: tensor.double() for name, tensor in weights.items()}
        self.rows, self.columns = sizes["latent_h"] // 2, sizes["latent_w"] // 2
        self.heads, self.depth = sizes["num_heads"], sizes["dim"] // sizes["num_heads"]
        zero = torch.zeros(self.rows * self.columns, self.heads, self.depth, dtype=torch.float64)
        self.slots = [[(zero, zero)] * sizes["window"] for _ in range(sizes["num_layers"])]
        self.G = self.L = 0
        self.turns: dict[int, Tensor] = {}

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def rms(self, name: str, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.weights[f"{name}.weight"]

    @staticmethod
    def layer_norm(x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def rotate(self, x: Tensor, position: int) -> Tensor:
        """One frame [tokens, N, D] at a time position."""
        if position not in self.turns:
            c = self.depth // 2
            sizes = (c - 2 * (c // 3), c // 3, c // 3)
            turns = [[cmath.exp(1j * at * 10000 ** (-2 * j / (2 * n)))
                      for at, n in zip((position, row, column), sizes) for j in range(n)]
                     for row in range(self.rows) for column in range(self.columns)]
            self.turns[position] = torch.tensor(turns, dtype=torch.complex128)
        turned = torch.complex(x[..., 0::2], x[..., 1::2]) * self.turns[position][:, None]
        return torch.stack([turned.real, turned.imag], dim=-1).reshape(x.shape)

    def heads_of(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), self.heads, self.depth)

    def normed_heads(self, module: str, side: str, x: Tensor) -> Tensor:
        return self.heads_of(self.rms(f"{module}.norm_{side}", self.linear(f"{module}.{side}", x)))

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (torch.einsum("qnd,knd->nqk", q, k) / self.depth**0.5).softmax(-1)
        return torch.einsum("nqk,knd->qnd", weights, v).flatten(1)

    def forward(self, frames: Tensor, t: float, prompt: Tensor, P: int, sink_recache: bool = False) -> Tensor:
        """One pass over frames [n, C, H, W] from latent frame P on; returns the flow."""
        W, S, n, G, L = self.sizes["window"], self.sizes["sink"], len(frames), self.G, self.L
        E = P + n
        recompute = E <= G and P > 0
        rolls = E > G and L + n > W
        ev = L + n - W if rolls else 0
        new_L = L + (E - G) - ev
        a = new_L - n
        w = max(a, S) if recompute else a
        if sink_recache and not rolls:
            w = a
        attended = [*range(S), *range(max(S, new_L - (W - S)), new_L)]

        patches = F.conv3d(frames.transpose(0, 1)[None], self.weights["patch_embedding.weight"],
                           self.weights["patch_embedding.bias"], stride=(1, 2, 2))[0]
        x = [patches[:, i].flatten(1).T for i in range(n)]
        e, e6 = self.time(t)
        text = self.text(prompt)
        for layer in range(self.sizes["num_layers"]):
            x = self.block(f"blocks.{layer}", x, e6, text, self.slots[layer], S, S + ev, L - ev, a, w, new_L,
                           attended, P)
        self.G, self.L = (G, L) if recompute else (E, new_L)

        shift, scale = self.weights["head.modulation"][0] + e
        out = [self.linear("head.head", self.layer_norm(y) * (1 + scale) + shift) for y in x]
        grids = [y.reshape(self.rows, self.columns, 2, 2, 16).permute(4, 0, 2, 1, 3) for y in out]
        return torch.stack([grid.reshape(16, 2 * self.rows, 2 * self.columns) for grid in grids])

    def block(self, name, x, e6, text, slots, S, past, kept, a, w, new_L, attended, P) -> list[Tensor]:
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self.weights[f"{name}.modulation"][0] + e6
        hidden = [self.layer_norm(y) * (1 + scale_a) + shift_a for y in x]
        project = f"{name}.self_attn"
        queries, keys = ([self.normed_heads(project, side, h) for h in hidden] for side in "qk")
        values = [self.heads_of(self.linear(f"{project}.v", h)) for h in hidden]
        if past > S:
            for slot in range(S, kept):
                slots[slot] = slots[slot + past - S]
        for slot in range(w, new_L):
            key = keys[slot - a] if self.infinity else self.rotate(keys[slot - a], P + slot - a)
            slots[slot] = (key, values[slot - a])
        key = torch.cat([self.rotate(slots[s][0], s) if self.infinity else slots[s][0] for s in attended])
        value = torch.cat([slots[s][1] for s in attended])
        out = []
        for i, y in enumerate(x):
            query = self.rotate(queries[i], a + i if self.infinity else P + i)
            y = y + gate_a * self.linear(f"{project}.o", self.attention(query, key, value))
            cross = f"{name}.cross_attn"
            weight, bias = self.weights[f"{name}.norm3.weight"], self.weights[f"{name}.norm3.bias"]
            query = self.normed_heads(cross, "q", self.layer_norm(y) * weight + bias)
            text_key = self.normed_heads(cross, "k", text)
            text_value = self.heads_of(self.linear(f"{cross}.v", text))
            y = y + self.linear(f"{cross}.o", self.attention(query, text_key, text_value))
            h = self.layer_norm(y) * (1 + scale_f) + shift_f
            h = F.gelu(self.linear(f"{name}.ffn.0", h), approximate="tanh")
            out.append(y + gate_f * self.linear(f"{name}.ffn.2", h))
        return out

    def time(self, t: float) -> tuple[Tensor, Tensor]:
        half = self.sizes["freq_dim"] // 2
        angles = [t * 10000 ** (-i / half) for i in range(half)]
        angles = torch.tensor(angles, dtype=torch.float64)
        e = self.linear("time_embedding.0", torch.cat([angles.cos(), angles.sin()]))
        e = self.linear("time_embedding.2", F.silu(e))
        return e, self.linear("time_projection.1", F.silu(e)).reshape(6, -1)

    def text(self, prompt: Tensor) -> Tensor:
        rows = torch.zeros(self.sizes["text_len"], prompt.shape[1], dtype=torch.float64)
        rows[:len(prompt)] = prompt
        hidden = F.gelu(self.linear("text_embedding.0", rows), approximate="tanh")
        return self.linear("text_embedding.2", hidden)

    def cache(self, which: int, layer: int) -> Tensor:
        """Keys (0) or values (1) of a layer as the recording lays them out, [1, W * tokens, N, D]."""
        return torch.cat([slot[which] for slot in self.slots[layer]])[None].float()

    def pointers(self) -> Tensor:
        return torch.tensor([self.G, self.L]) * self.rows * self.columns


def naive_rollout(sizes: dict, weights: dict[str, Tensor], inputs: dict[str, Tensor],
                  options: dict) -> dict[str, Tensor]:
    """SPEC 4.1 and 5: the tensors of one recorded case."""
    model = Naive(sizes, weights, options.get("infinity", False))
    noise, step_noise, prompts = (inputs[name].double() for name in ("noise", "step_noise", "prompt_embeds"))
    raw = torch.linspace(1, 0, 1001)[:-1]
    sigmas = sizes["shift"] * raw / (1 + (sizes["shift"] - 1) * raw)
    steps = [1000 - s for s in sizes["steps"]]
    switches, segment, recorded = options.get("switches", []), 0, {}
    global_sink, latents = options.get("global_sink", True), []

    def record(moment: str) -> None:
        recorded[f"{moment}.pointers"] = model.pointers()
        recorded[f"{moment}.k.layer1"], recorded[f"{moment}.v.layer1"] = model.cache(0, 1), model.cache(1, 1)

    for block in range(sizes["num_blocks"]):
        s = block * sizes["block"]
        if segment < len(switches) and s >= switches[segment]:
            segment += 1
            if s > 0:
                if not global_sink:
                    model.slots = [[(key * 0, value * 0) for key, value in layer] for layer in model.slots]
                n = min(sizes["window"], s)
                model.forward(torch.stack(latents[-n:]), 0.0, prompts[segment], s - n, not global_sink)
                record(f"recache{segment - 1}")
        noisy, estimates = noise[0, s:s + sizes["block"]], []
        for i, index in enumerate(steps):
            sigma, t = sigmas[index].double(), (1000 * sigmas[index]).item()
            x0 = noisy - sigma * model.forward(noisy, t, prompts[segment], s)
            estimates.append(x0)
            if i + 1 < len(steps):
                sigma = sigmas[steps[i + 1]].double()
                noisy = (1 - sigma) * x0 + sigma * step_noise[block, i]
        latents += x0
        model.forward(x0, 0.0, prompts[segment], s)
    record("final")
    return recorded | {"latents": torch.stack(latents)[None].float()}


def random_weights(sizes: dict, generator: torch.Generator) -> dict[str, Tensor]:
    """Every parameter random, none left at 0 or 1."""
    weights = {}
    for name, tensor in CausalDiT(dit_config(sizes)).state_dict().items():
        scale = 0.1 if tensor.ndim == 1 or "modulation" in name else tensor[0].numel()**-0.5
        centre = 1.0 if "norm" in name and "weight" in name else 0.0
        weights[name] = torch.randn(tensor.shape, generator=generator) * scale + centre
    return weights


def make_folder(folder: Path, window: int, sink: int, block: int, seed: int, cases: dict[str, dict]) -> dict:
    """Record the naive implementation's rollouts as a parity folder; returns the sizes."""
    sizes = dict(dim=32, num_heads=2, num_layers=2, ffn_dim=24, freq_dim=16, text_dim=12, text_len=5,
                 latent_h=4, latent_w=6, window=window, sink=sink, block=block,
                 num_blocks=-(-2 * window // block) + 1,
                 steps=[1000, 600, 300], shift=3.0)
    generator = torch.Generator().manual_seed(seed)
    weights = random_weights(sizes, generator)
    frames, shape = sizes["num_blocks"] * block, (16, sizes["latent_h"], sizes["latent_w"])
    inputs = {"noise": torch.randn(1, frames, *shape, generator=generator),
              "step_noise": torch.randn(sizes["num_blocks"], 2, block, *shape, generator=generator),
              "prompt_embeds": torch.randn(4, 4, sizes["text_dim"], generator=generator)}
    save_file(weights, folder / "stream_weights.safetensors")
    save_file(inputs, folder / "stream_inputs.safetensors")
    for name, options in cases.items():
        save_file({k: v.contiguous() for k, v in naive_rollout(sizes, weights, inputs, options).items()},
                  folder / f"{name}.safetensors")
    (folder / "manifest.json").write_text(json.dumps(
        {"configs": {"stream": sizes}, **{name: {"options": options} for name, options in cases.items()}}))
    return sizes


# Window, sink, block: windows that are no multiple of the block, no sink, sinks smaller and larger than it.
GEOMETRIES = [(6, 0, 1), (7, 2, 3), (8, 3, 4), (12, 3, 3), (11, 0, 2), (8, 3, 2), (12, 6, 4), (9, 5, 2)]


@pytest.mark.parametrize("window, sink, block", GEOMETRIES)
def test_other_sizes_match_the_naive_implementation(tmp_path, window, sink, block):
    """A rule that holds for 12, 3, 3 alone. The switches: two that fall into one block, and one past the
    window, none a multiple of the block (for blocks longer than one frame).
    """
    switches = [block + 1, block + 2, window + 2 + (window + 2) % block // max(block - 1, 1)]
    cases = {"plain": {}, "infinity": {"infinity": True}}
    cases |= {f"{name}_{sink_stays}": {**options, "switches": switches, "global_sink": sink_stays}
              for name, options in list(cases.items()) for sink_stays in (True, False)}
    make_folder(tmp_path, window, sink, block, seed=window, cases=cases)
    checked = list(check_directory(tmp_path))
    assert {case.name for case in checked} == set(cases)
    assert not [str(case) for case in checked if case.error > TARGET]
    recaches = {case.name: case.tensors for case in checked}
    assert recaches["plain"] == 4 and recaches["plain_True"] == 4 + 3 * 3


def test_switch_at_the_first_frame_matches_the_naive_implementation(tmp_path):
    """A switch at frame 0 recomputes nothing and must not be taken for a recache of 0 frames."""
    make_folder(tmp_path, 6, 2, 3, seed=1, cases={"start": {"switches": [0, 4], "global_sink": False}})
    case, = check_directory(tmp_path)
    assert case.error <= TARGET and case.tensors == 7
