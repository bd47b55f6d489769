"""train_nora.py: what it reads, sees, learns, saves and says, on tiny real-format backbones."""

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from unittest.mock import Mock

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import compute_stats
import make_demo
import train_nora as nora
from common import UserError, qwen_vl
from common import checkpoint as ckpt
from common import episodes as ep
from common.config import parse_config
from common.log import read_metrics

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
LORA = ["--train", "lora", "--lora_rank", 4, "--lora_alpha", 8]


@pytest.fixture(scope="module")
def base(insertion_root, qwen_dir):
    """Flags of a run of a second: 4 training frames per step, every log on, no warm-up."""
    words = (
        "--fast fit --fast_vocab_size 300 --horizon 3 --use_ee_pose_delta_as_action --num_val_episodes 1 "
        "--cameras camera1 camera3 --resize_resolution 56 56 --batch_size 4 --gradient_accumulation_steps 1 --lr 1e-3 "
        "--num_warmup_steps 0 --num_workers 0 --logging_frequency 1 --val_frequency 1000 "
        "--checkpoint_save_frequency 1000 --val_samples 8 --val_decode_samples 2"
    )
    return ["--dataset.root_dir", insertion_root, "--model", qwen_dir, *words.split()]


def config(flags, *more):
    return parse_config(nora.Config, [str(f) for f in [*flags, *more]], nora.ALIASES)


def run(flags, *more):
    """Train in this process -> metrics."""
    cfg = config(flags, *more)
    nora.main(cfg)
    return read_metrics(cfg.output_dir)


def shell(flags, *more, processes=1, env=None, script=ROOT / "train_nora.py"):
    head = [sys.executable]
    if processes > 1:
        head += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*head, str(script), *map(str, flags), *map(str, more)]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return result.stdout


def losses(rows):
    return [(r["step"], r["train_loss"]) for r in rows if "train_loss" in r]


def values(rows, key):
    return [r[key] for r in rows if key in r]


def state(folder):
    return ckpt.load_state(Path(folder) / "state.pt")["trained"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def build(cfg, spec, train=None):
    """-> Nora of cfg's weights, on the CPU, fp32."""
    processor = nora.Processor(nora.weights_source(cfg), spec)
    return nora.build_model(cfg, processor, CPU, torch.float32, "sdpa")[0]


@pytest.fixture(scope="module")
def parts(base):
    """cfg, data, fast, processor, collate, dataset, core model and policy of the base run."""
    cfg = config(base)
    data = nora.load_data(cfg)
    fast, core = nora.fit_fast(cfg, data), build(cfg, data.spec)
    return types.SimpleNamespace(
        cfg=cfg,
        data=data,
        spec=data.spec,
        fast=fast,
        processor=core.processor,
        collate=nora.Collate(core.processor, fast, data.spec.normalizer),
        dataset=nora.NoraDataset(data.train, data.spec),
        core=core,
        policy=nora.Policy(core, fast, data.spec),
    )


def items_of(parts, indices):
    return [parts.dataset[(0, i)] for i in indices]


def observation(parts, item, **more):
    """What a robot would send at that frame."""
    episode = next(e for e in parts.data.train if e.name == item["episode"])
    reader, cameras = ep.ImageReader(), parts.spec.cameras
    images = {c: reader.read(episode, name, item["frame"]) for c, name in cameras.items()}
    return dict(images=images, instruction=item["instruction"], **more)


# ---- data ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def plain(base, tmp_path_factory):
    """(flags, metrics, folder of step 2) of a run."""
    out = tmp_path_factory.mktemp("plain")
    flags = [*base, "--max_steps", 2, "--output_dir", out]
    return flags, run(flags), out / "steps_2"


@pytest.mark.parametrize("shape", [(56, 80), (240, 320)])
def test_pictures_are_resized_as_by_pillow_also_flipped_views(shape):
    rgb = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(rgb).resize((112, 84), Image.BICUBIC), np.float32)
    for picture in (rgb, np.ascontiguousarray(rgb[..., ::-1])[..., ::-1], Image.fromarray(rgb)):
        away = np.abs(nora.resize_image(picture, (84, 112)) - expected)
        assert away.max() <= 3 and away.mean() < 0.05


def test_a_frame_store_gives_the_same_training(tmp_path, plain):
    again = run(plain[0], "--frame_store", tmp_path / "frames", "--output_dir", tmp_path / "run")
    assert losses(again) == losses(plain[1]) and any((tmp_path / "frames").glob("**/*.u8"))


def test_augmentation_and_dropout_are_functions_of_seed_and_position(base, parts):
    more = "--augment --camera_dropout_prob 1 --cameras camera1 camera2 camera3 --min_cameras 2"
    cfg = config(base, *more.split())
    data = nora.load_data(cfg)
    a, b = (nora.NoraDataset(data.train, data.spec, cfg.dataset, cfg.seed) for _ in range(2))
    blank = []
    for p in range(60):
        x = a[(p, 3)]["images"]
        np.testing.assert_array_equal(x, b[(p, 3)]["images"])
        blank.append([bool((view == 0).all()) for view in x])
    blank = np.array(blank)
    assert set(blank.sum(1)) == {0, 1} and blank.any(0).all(), "two of three always stay, each is dropped at times"
    assert not np.array_equal(a[(0, 3)]["images"], a[(1, 3)]["images"])
    np.testing.assert_array_equal(parts.dataset[(0, 3)]["images"], parts.dataset[(1, 3)]["images"])


# ---- prompt, images and model against transformers -------------------------------------------------------------------
def official_processor(folder):
    """transformers' own image processor; AutoImageProcessor needs torchvision in some releases."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil.from_pretrained(folder)


def official_inputs(parts, item, answer):
    """One row made the way transformers documents it: processor output, mm_token_type_ids, labels."""
    tokenizer = parts.processor.tokenizer
    images = [Image.fromarray(i) for i in item["images"]]
    pixels = official_processor(parts.cfg.model)(images=images, return_tensors="pt")
    content = [{"type": "image"}] * len(item["images"]) + [{"type": "text", "text": item["instruction"]}]
    turn = [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    for grid in pixels["image_grid_thw"]:
        text = text.replace("<|image_pad|>", "<X>" * int(grid.prod() // 4), 1)
    ids = torch.tensor([tokenizer(text.replace("<X>", "<|image_pad|>"))["input_ids"] + answer])
    labels = ids.clone()
    labels[:, : -len(answer)] = -100
    kinds = (ids == parts.processor.image_token_id).int()
    text = dict(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds, labels=labels)
    return text | dict(pixels)


def test_loss_equals_transformers_own_loss(parts):
    """Right padding without a mask, hand-made rope positions, batched windows, logits at labels only: still its own."""
    items = items_of(parts, [0, 5, 9])
    items[1]["instruction"] = "put the tip on the rim and wait there"
    with torch.no_grad():
        ours = parts.core.compute_loss(parts.collate(items))["sample_loss"]
        for item, loss in zip(items, ours, strict=True):
            actions = parts.fast.encode(parts.spec.normalizer.normalize(item["action"]))
            answer = [parts.processor.first_action + i for i in actions] + [parts.processor.end]
            theirs = parts.core.vlm(**official_inputs(parts, item, answer)).loss * len(answer)
            assert loss.item() == pytest.approx(theirs.item(), rel=2e-5)


def test_logits_of_an_older_release(shared):
    """A checkpoint that transformers 4.50.3 saved, and what that release computed from it: ids and all logits."""
    folder = shared / "fixtures" / "nora_tf450"
    expected = np.load(folder / "io.npz")
    definition = dict(source="action", dim=1, rotation_unit="rad")
    stats = dict(action={k: [0.0] for k in ("mean", "std", "min", "max", "q01", "q99")})
    about = dict(script="train_nora", images={"camera1": None}, actions=[("x", "")], horizon=1, rate_hz=15)
    about |= dict(kind="absolute", first_row="", recorded={"camera1": "side"})
    spec = nora.Spec([224, 224], "", [], definition, about, stats)
    processor = nora.Processor(folder / "model", spec)
    answer = [processor.first_action + i for i in (5, 77, 2047)] + [processor.end]
    prompt = processor.ids("Insert the needle into the target point")
    ids = (prompt + answer)[: len(expected["ids"])]
    assert ids == expected["ids"].tolist()[: len(ids)] and len(prompt) < len(ids)
    core = nora.Nora(qwen_vl.load_backbone(processor.folder, torch.float32, "sdpa"), processor)
    ids = expected["ids"].tolist()
    positions = torch.from_numpy(qwen_vl.rope_positions(ids, processor.image_token_id, processor.grid))[:, None]
    with torch.no_grad():
        seen = core.pictures(torch.from_numpy(expected["img"])[None, None])
        hidden = core.vlm.model(input_ids=torch.tensor([ids]), position_ids=positions, use_cache=False, **seen)
        logits = core.vlm.lm_head(hidden.last_hidden_state)[0]
    np.testing.assert_allclose(logits.numpy(), expected["logits"], atol=1e-4)


@pytest.mark.parametrize("h, w", [(112, 112), (224, 112), (112, 140), (56, 56), (336, 616), (140, 196)])
def test_batched_windows_equal_the_loop(parts, h, w):
    """Windows of one size, of two and of four, and an image smaller than one: transformers' own tower, to rounding."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

    tower, attention, batched = parts.core.vlm.model.visual, qwen.Qwen2_5_VLVisionAttention, {}
    windows = -(-h // 112) * -(-w // 112)
    patches, grid = torch.randn(2 * h * w // 196, 1176), torch.tensor([[1, h // 14, w // 14]] * 2)
    weight = torch.randn(2 * h * w // 784, tower.merger.mlp[-1].out_features)

    def see():
        tower.zero_grad()
        seen = tower(patches, grid).pooler_output
        (seen * weight).sum().backward()
        return dict(seen=seen.detach()) | {n: p.grad.clone() for n, p in tower.named_parameters()}

    batched = count_attention(see)
    with torch.no_grad(), Operations() as done:  # the grid is known: nothing reads a value off the device
        tower(patches, grid)
    assert not {"_local_scalar_dense", "nonzero", "_unique2", "unique_consecutive"} & set(done.names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "forward", attention.looped_forward)
        patch.setattr(type(tower), "forward", type(tower).plain_forward)
        looped = count_attention(see)
    layers, full = len(tower.blocks), len(set(tower.fullatt_block_indexes) & set(range(len(tower.blocks))))
    assert looped["calls"] == 2 * windows * (layers - full) + 2 * full
    assert batched["calls"] <= (2 ** sum(x > 112 and x % 112 > 0 for x in (h, w))) * (layers - full) + full
    for name, value in looped.items():
        if name != "calls":
            largest = value.abs().max().item()
            torch.testing.assert_close(batched[name], value, atol=1e-5 * largest, rtol=1e-4, msg=name)
    tower.zero_grad()


def count_attention(see):
    """see() -> its dict and "calls", those of scaled_dot_product_attention."""
    calls, attend = [], torch.nn.functional.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch:
        counted = lambda *a, **k: (calls.append(1), attend(*a, **k))[1]  # noqa: E731
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
        return see() | dict(calls=len(calls))


class Operations(TorchDispatchMode):
    """Names of the operations that run within it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_a_report_leaves_out_what_cannot_be_read_and_knows_its_episodes(insertion_root, parts, tmp_path, capsys):
    with pytest.raises(UserError, match="no episode 'x.h5'.*--episodes"):
        list(parts.policy.open_episodes(insertion_root, ["x.h5"]))
    folder = shutil.copytree(insertion_root, tmp_path / "data")
    (folder / "broken.h5").write_bytes(b"")
    assert [len(list(parts.policy.open_episodes(folder))) for _ in range(2)] == [4, 4]
    assert capsys.readouterr().out.count("excluded") == 1, "read once, until a file changes"
    for path in [*ep.find_episodes(folder)][1:]:
        with h5py.File(path, "r+") as f:
            f.move("observations/ee_pose", "observations/pose")
    with pytest.raises(UserError, match="has side_camera.*; the policy needs ee_pose"):
        list(parts.policy.open_episodes(folder))


def test_decoding_cannot_leave_the_format_and_is_greedy(tmp_path, parts):
    """Random weights want to say anything; the answer has exactly H*A coefficients, each the best one allowed by a
    full forward pass, whatever the checkpoint's generation_config.json says."""
    shutil.copytree(parts.cfg.model, tmp_path / "model")
    odd = dict(do_sample=True, repetition_penalty=5.0, temperature=3.0, max_new_tokens=2)
    (tmp_path / "model/generation_config.json").write_text(json.dumps(odd))
    core, fast, p = build(config([], "--model", tmp_path / "model"), parts.spec), parts.fast, parts.processor
    items = items_of(parts, range(4))
    prompts = [p.ids(i["instruction"]) for i in items]
    policy = nora.Policy(core, fast, parts.spec)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        decode = fast.decode
        patch.setattr(fast, "decode", lambda ids, *shape: (seen.append(ids), decode(ids, *shape))[1])
        _, malformed = policy.decode(np.stack([i["images"] for i in items]), prompts)
    assert all(len(fast.text(ids)) == 18 and "\ufffd" not in fast.text(ids) for ids in seen) and malformed.any()
    for item, ids in zip(items[:2], seen, strict=False):
        answer = [p.first_action + i for i in ids] + [p.end]
        with torch.no_grad():
            logits = core.vlm(**official_inputs(parts, item, answer)).logits[0, -len(answer) - 1 : -1]
        remaining, open_ = 18, 0
        for row, i in zip(logits, ids, strict=False):
            allowed = np.flatnonzero(fast.valid & (fast.lead == open_) & (fast.starts <= remaining))
            assert i == max(allowed, key=lambda k: row[p.first_action + k].item())
            remaining, open_ = remaining - fast.starts[i], fast.tail[i]
        assert (remaining, open_) == (0, 0)


def test_tokens_that_tie_in_bf16_are_told_apart(base, parts):
    core, fast = build(config(base), parts.spec).bfloat16(), parts.fast
    whole = fast.valid & (fast.lead == 0) & (fast.tail == 0) & (fast.starts == 1)
    rows, best = core.vlm.lm_head.weight.data[parts.processor.first_action :], np.flatnonzero(whole)[7]
    rows[:] = 1
    rows[best, 0] += 2**-7
    core.vlm.model.language_model.norm.register_forward_hook(lambda norm, x, out: torch.ones_like(out))
    item, expected = items_of(parts, [0])[0], parts.spec.normalizer.unnormalize(fast.decode([best] * 18, 3, 6))
    prompt = parts.processor.ids(item["instruction"])
    answer = nora.Policy(core, fast, parts.spec).decode(item["images"][None], [prompt])[0][0]
    np.testing.assert_array_equal(answer, expected)


# ---- optimisation ----------------------------------------------------------------------------------------------------
def test_the_learning_rate_warms_up_and_falls_to_zero():
    cfg = nora.Config(learning_rate=1.0, num_warmup_steps=4, max_train_steps=12)
    assert [nora.lr_at(s, cfg) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert nora.lr_at(8, cfg) == pytest.approx(0.5) and nora.lr_at(12, cfg) == 0 and nora.lr_at(500, cfg) == 0


def test_one_batch_can_be_learned_and_every_form_of_the_policy_predicts_the_same(tmp_path, base, parts):
    more = "--max_steps 60 --num_val_episodes 3 --lr 3e-3 --logging_frequency 10 --batch_size 13 --val_frequency 30"
    rows = run(base, "--output_dir", tmp_path, *more.split())
    assert losses(rows)[-1][1] < 0.35 * losses(rows)[0][1]
    best = min((r for r in rows if "val_loss" in r), key=lambda r: r["val_loss"])["step"]
    assert json.loads((tmp_path / "best/meta.json").read_text())["best_step"] == best
    seen, forms = [observation(parts, i) for i in items_of(parts, [0, 9])], ["", "steps_60", "steps_60/model"]
    answers = [nora.load_policy(tmp_path / form, "cpu").predict(seen) for form in forms + ["best"] * (best == 60)]
    assert all(np.array_equal(answer, answers[0]) for answer in answers)


# ---- the exported model ----------------------------------------------------------------------------------------------
def test_transformers_opens_the_exported_model(plain):
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration as Model

    folder = plain[2] / "model"
    vlm, info = Model.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert vlm.lm_head.weight.data_ptr() == vlm.get_input_embeddings().weight.data_ptr()
    assert torch.equal(vlm.lm_head.weight, state(plain[2])["vlm.model.language_model.embed_tokens.weight"])
    assert AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<robot_action_2047>")
    assert official_processor(folder).patch_size == 14


def test_a_model_of_an_older_release_is_exported_in_its_files(tmp_path, base, shared):
    """transformers 4.50 must read what was fine-tuned from its files: they stay as they are, the tensors' names too."""
    source = shared / "fixtures" / "nora_tf450" / "model"
    run(base, "--model", source, "--output_dir", tmp_path, "--max_steps", 1)
    folder = tmp_path / "steps_1" / "model"
    for path in source.glob("*.*"):
        if path.suffix in (".json", ".txt") and not path.name.endswith("index.json") and path.name != "config.json":
            assert (folder / path.name).read_bytes() == path.read_bytes(), path.name
    then, now = (json.loads((f / "config.json").read_text()) for f in (source, folder))
    assert now == then | dict(torch_dtype="float32")
    names = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"].keys()
    assert load_file(folder / "model.safetensors").keys() == names
    if older := os.environ.get("PYTHON_WITH_TRANSFORMERS_4_50"):  # where there is one
        opened = "t.AutoProcessor.from_pretrained(f), t.Qwen2_5_VLForConditionalGeneration.from_pretrained(f)"
        subprocess.run([older, "-c", f"import sys, transformers as t; f = sys.argv[1]; {opened}", folder], check=True)
    rows = run(base, "--model", source, "--output_dir", tmp_path, "--max_steps", 2, "--resume", "auto")
    assert len(losses(rows)) == 2


def test_a_backbone_without_action_tokens_is_refused(tmp_path, parts):
    plain = make_demo.write_qwen2_5_vl(tmp_path, text=(64, 2), vision=(32, 2), action_tokens=False)
    with pytest.raises(UserError, match="has no 2048 tokens <robot_action_0>.*declare-lab/nora"):
        nora.Processor(plain, parts.spec)


# ---- resume and ranks ------------------------------------------------------------------------------------------------


COUNTED = """
import os, sys
sys.path.insert(0, {root!r})
import train_nora as nora
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as fsdp

gathers, validate = [], nora.validate
gather = fsdp.foreach_all_gather
fsdp.foreach_all_gather = lambda *args, **how: (gathers.append(1), gather(*args, **how))[1]


def counted(*args):
    before = len(gathers)
    values = validate(*args)
    with open({folder!r} + "/gathers_" + os.environ["RANK"], "a") as file:  # lines of two ranks mix in one output
        print(len(gathers) - before, file=file)
    return values


nora.validate = counted
nora.launch(nora.main, nora.Config, nora.ALIASES)
"""


def test_fsdp_equals_one_process_and_gathers_once_per_validation(tmp_path, base):
    """FSDP2 over 2 gloo processes: losses, the exported models, a resume, and the collectives of a validation, in which
    only one of them has answers to decode."""
    flags = [*base, "--max_steps", 3, "--val_frequency", 2, "--checkpoint_save_frequency", 2, "--val_samples", 9]
    (tmp_path / "counted.py").write_text(COUNTED.format(root=str(ROOT), folder=str(tmp_path)))
    shell(flags, "--output_dir", tmp_path / "two", "--fsdp", processes=2, script=tmp_path / "counted.py")
    for rank in (0, 1):  # two layers, two vision blocks and the rest; in each of two validations
        assert (tmp_path / f"gathers_{rank}").read_text().split() == ["5", "5"]
    one = run(flags, "--output_dir", tmp_path / "one", "--batch_size", 8)
    two = read_metrics(tmp_path / "two")
    for key in ("train_loss", "val_loss", "val_action_mae"):
        np.testing.assert_allclose(values(two, key), values(one, key), rtol=1e-4)
    for which in ("", "best"):
        a, b = (nora.load_policy(tmp_path / name / which, "cpu").model.state_dict() for name in ("one", "two"))
        for k in a:
            torch.testing.assert_close(a[k], b[k], rtol=1e-3, atol=5e-4, msg=k)
    shutil.rmtree(tmp_path / "two/steps_3")
    shell(flags, "--output_dir", tmp_path / "two", "--fsdp", "--resume", "auto", processes=2)
    resumed = losses(read_metrics(tmp_path / "two"))
    assert resumed[:2] == losses(two)[:2] and resumed[2][1] == pytest.approx(losses(two)[2][1], rel=1e-5)


# ---- what is trained -------------------------------------------------------------------------------------------------
def test_lora_trains_the_adapter_and_the_action_rows_and_merges(tmp_path, base, parts, qwen_dir):
    from transformers import Qwen2_5_VLForConditionalGeneration as Model

    run(base, *LORA, "--output_dir", tmp_path / "run", "--max_steps", 3)
    step = tmp_path / "run/steps_3"
    assert all("lora_" in k or "trainable_tokens" in k for k in state(step))
    assert not any("visual" in k for k in state(step))
    about = json.loads((step / "model/adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(qwen_dir) and not (step / "model/model.safetensors").exists()
    before, after = (Model.from_pretrained(p).state_dict() for p in (qwen_dir, step / "merged"))
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved and all("language_model.layers" in k or "embed_tokens" in k or "lm_head" in k for k in moved)
    table = "model.language_model.embed_tokens.weight"
    rows = (before[table] != after[table]).any(1).nonzero().flatten()
    assert rows.min() >= parts.processor.first_action, "only action rows"
    assert torch.equal(after[table], after["lm_head.weight"]), "still tied"
    seen = [observation(parts, i) for i in items_of(parts, [0, 11])]
    a, b = (nora.load_policy(p, "cpu").predict(seen) for p in (step, step / "merged"))
    np.testing.assert_allclose(a, b, atol=1e-6)
    shutil.rmtree(step / "merged")
    run(base, *LORA, "--output_dir", tmp_path / "run", "--max_steps", 3, "--resume", "auto")
    assert (step / "merged/policy.json").is_file(), "a finished run writes the export that is missing"


def test_a_merge_keeps_the_dtype_of_the_base(tmp_path, base, qwen_dir):
    """bf16 as published: in fp32 it would take twice the memory of the host."""
    half = shutil.copytree(qwen_dir, tmp_path / "half")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(half / "model.safetensors").items()}
    save_file(tensors, half / "model.safetensors", {"format": "pt"})
    run(base, *LORA, "--model", half, "--output_dir", tmp_path / "run", "--max_steps", 1)
    merged = load_file(tmp_path / "run/steps_1/merged/model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}


def test_an_adapter_stands_on_the_weights_it_was_trained_on(tmp_path, base, parts, monkeypatch):
    """--load_model_weights is what the model is read from: by training, its resume, its checkpoint and its merge."""
    run(base, "--output_dir", tmp_path / "first", "--max_steps", 4, "--lr", 3e-2)
    monkeypatch.chdir(tmp_path)
    flags = [*base, *LORA, "--load_model_weights", "first/steps_4", "--output_dir", "second"]
    first = run(flags, "--max_steps", 2, "--val_frequency", 2)
    source = build(config(base, "--load_model_weights", "first/steps_4"), parts.spec).vlm.state_dict()
    assert same(source, nora.load_policy("first", "cpu").model.vlm.state_dict())
    monkeypatch.chdir(ROOT)
    items = items_of(parts, [0, 5])
    for name in ("model", "merged", "../best"):
        policy = nora.load_policy(tmp_path / "second/steps_2" / name, "cpu")
        held_out = nora.NoraDataset(nora.load_data(parts.cfg).validation, policy.spec)
        collate = nora.Collate(policy.model.processor, policy.fast, policy.spec.normalizer)
        again = nora.validate(policy, held_out, collate, parts.cfg, ALONE)
        assert again["val_loss"] == pytest.approx(first[-1]["val_loss"], rel=1e-4), name
    assert policy.predict([observation(parts, i) for i in items]).shape == (2, 3, 6)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="trained on the weights of .*first/steps_4/model"):
        run([*base, *LORA, "--output_dir", "second"], "--max_steps", 3, "--resume", "auto")
    assert len(losses(run(flags, "--max_steps", 3, "--resume", "auto"))) == 3
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="CUBLAS"):  # of the machine, not of a file
        patch.setattr("peft.PeftModel.merge_and_unload", Mock(side_effect=RuntimeError("CUBLAS")), raising=False)
        nora.load_policy("second", "cpu")
    lora = load_file(path := "second/steps_3/model/adapter_model.safetensors")
    save_file({name: tensor * float("nan") for name, tensor in lora.items()}, path)
    with pytest.raises(UserError, match="adapter_model.safetensors: .* not finite"):
        nora.load_policy("second", "cpu")
    save_file(dict(list(lora.items())[:-1]), path)
    with pytest.raises(UserError, match="lacks a file.*missing adapter keys"):
        nora.load_policy("second", "cpu")
    tensors = load_file("first/steps_4/model/model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, "first/steps_4/model/model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="other weights than those that the adapter was trained on"):
        nora.load_policy("second", "cpu")
    shutil.rmtree("first/steps_4/model")
    with pytest.raises(UserError, match="policy.json names it"):
        nora.load_policy("second", "cpu")
    with pytest.raises(UserError, match="whole model.*--merge second/steps_3"):
        build(config(base, "--load_model_weights", "second/steps_3/model"), parts.spec)


def test_head_trains_the_embedding_table_only_and_gradient_checkpointing_changes_no_loss(tmp_path, base):
    flags = [*base, "--max_steps", 2, "--train", "head"]
    a, b = (run(flags, "--output_dir", tmp_path / str(on), "--gradient_checkpointing", on) for on in (False, True))
    np.testing.assert_allclose(values(a, "train_loss"), values(b, "train_loss"), rtol=1e-6)
    assert set(state(tmp_path / "True/steps_2")) == {"vlm.model.language_model.embed_tokens.weight"}


def test_language_leaves_the_vision_tower_as_it_was(tmp_path, base, qwen_dir):
    """Masters in fp32, frozen in the backbone's bits and out of state.pt, exported in bf16; a resume goes on."""
    flags = [*base, "--train", "language", "--output_dir", tmp_path, "--mixed-precision", "bf16", "--val_frequency", 1]
    run(flags, "--max_steps", 1)
    kept = state(tmp_path / "steps_1")
    assert not any("visual" in k for k in kept) and any("layers.1.mlp" in k for k in kept)
    assert {v.dtype for v in kept.values()} == {torch.float32}
    for folder in ("steps_1", "best"):
        after = load_file(tmp_path / folder / "model/model.safetensors")
        assert {v.dtype for v in after.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "best/model/config.json").read_text())["dtype"] == "bfloat16"
    before = load_file(qwen_dir / "model.safetensors")
    moved = {name for name, value in before.items() if not torch.equal(after[name], value.bfloat16())}
    assert not any("visual" in name for name in moved)
    assert {name for name, value in before.items() if value.ndim == 2 and "visual" not in name} <= moved
    assert len(losses(run(flags, "--max_steps", 2, "--resume", "auto"))) == 2


def test_moments_in_8_bits_are_bitsandbytes_own(monkeypatch, parts):
    class AdamW8bit(torch.optim.AdamW):
        pass

    cfg, layer = dataclasses.replace(parts.cfg, adamw_8bit=True), torch.nn.Linear(2, 1, bias=False)
    for there in (None, True):
        monkeypatch.setattr(nora, "find_spec", lambda name, there=there: there)
        with contextlib.nullcontext() if there else pytest.raises(UserError, match="pip install bitsandbytes"):
            nora.check_config(cfg)
    for name in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(AdamW8bit=AdamW8bit))
    optimizer, saved = nora.build_optimizer(cfg, layer.parameters(), None), dict(step=3, state1=torch.ones(1, 2))
    assert type(optimizer) is AdamW8bit and optimizer.defaults["betas"] == (0.9, 0.95)
    ckpt.restore_moments(layer, optimizer, dict(weight=saved))
    assert optimizer.state[layer.weight]["step"] == 3 and optimizer.state[layer.weight]["state1"].sum() == 2


def test_the_state_can_be_noisy_or_missing_in_training_only(base):
    """Functions of seed and position; the prompt of a sample without state has none."""
    flags = [*base, "--state_in_prompt", "--state_noise", 0.1, "--state_dropout", 0.3]
    cfg, data = config(flags), nora.load_data(config(flags))
    noisy, again = (nora.NoraDataset(data.train, data.spec, cfg.dataset, cfg.seed) for _ in range(2))
    plain, states = nora.NoraDataset(data.train, data.spec)[(0, 3)]["state"], []
    for p in range(80):
        state, other = (d[(p, 3)]["state"] for d in (noisy, again))
        assert (state is None) == (other is None)
        if state is not None:
            np.testing.assert_array_equal(state, other)
            states.append(state - plain)
    assert 40 <= len(states) <= 70 and 0.08 < np.std(states) < 0.12
    off = nora.NoraDataset(data.train, data.spec, nora.DatasetConfig(), cfg.seed)
    np.testing.assert_array_equal(off[(5, 3)]["state"], plain)


# ---- faults and what it says -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("installed", ["absent", "broken", "raises on the device", "works"])
def test_flash_attention_is_tried_before_it_is_chosen(monkeypatch, installed):
    def on_device(q, k, v):
        if installed == "raises on the device":
            raise RuntimeError("FlashAttention only supports Ampere GPUs or newer")
        if q.dtype == torch.float32:
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")

    module = types.ModuleType("flash_attn") if installed != "absent" else None
    if installed not in ("absent", "broken"):
        module.flash_attn_func = on_device
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    picked = qwen_vl.pick_attention("auto", CPU, torch.bfloat16)
    assert picked == ("flash_attention_2" if installed == "works" else "sdpa")
    assert qwen_vl.pick_attention("auto", CPU, torch.float32) == "sdpa"
    if installed == "raises on the device":
        with pytest.raises(UserError, match="Flash Attention not supported.*Ampere"):
            qwen_vl.pick_attention("flash_attention_2", CPU, torch.bfloat16)


def test_check_needs_no_weights_and_shows_a_batch(base, capsys, monkeypatch):
    monkeypatch.setattr(nora, "build_model", None)
    nora.main(config(base, "--check"))
    shown = capsys.readouterr().out
    parts = ("3 training episodes", "(4, 2, 56, 56, 3)", "Insert the needle", "<robot_action_", "q01", "check passed")
    for part in (*parts, "tokens per chunk", "holding still", "dx mm", "not seen by the model"):
        assert part in shown, shown
    assert "warning" not in shown
    nora.main(config(base, "--check", "--model", "/no/model", "--use_ee_pose_delta_as_action", "false"))
    shown = capsys.readouterr().out
    assert "not shown: '/no/model'" in shown and "check passed" in shown
    assert "use_ee_pose_delta_as_action: true" in shown, "yesterday's action"


def test_what_no_policy_can_win_is_said_before_the_training(tmp_path, base, capsys):
    """Joint targets of a wide range at horizon 1: FAST is coarser than the motion. A rare motion is clipped."""
    for k, path in enumerate(make_demo.write_insertion(tmp_path / "far", episodes=4, size=(60, 80), action="joints")):
        with h5py.File(path, "r+") as f:
            f["action"][:] += 9 * k
            f["observations/qpos"][:] += 9 * k
    recorded = ["--use_ee_pose_delta_as_action", "false"]
    nora.main(config(base, "--check", "--dataset.root_dir", tmp_path / "far", "--horizon", 1, *recorded))
    assert "the error of holding still: q1 " in capsys.readouterr().out
    for path in make_demo.write_insertion(tmp_path / "rare", episodes=4, size=(60, 80), layout="raw"):
        with h5py.File(path, "r+") as f:
            f["observations/ee_pose"][:, 4] = 1e-6 * np.sin(np.arange(len(f["action"])))
            if path.name.endswith("0.h5"):
                f["observations/ee_pose"][5:, 4] += 0.05
    more = ["--camera_dropout_prob", 0.3, "--cameras", "camera1", "--max_steps", 9, "--num_warmup_steps", 9]
    nora.main(config(base, "--check", "--dataset.root_dir", tmp_path / "rare", "--horizon", 1, *more))
    said = capsys.readouterr().out
    assert "the error of holding still: dpitch rad 9" in said and "camera_dropout_prob has no effect" in said
    assert "the warm-up takes 9 steps, the training 9" in said


class Swapped:
    """A policy that answers from its images, or without looking: what it decodes of two cameras."""

    def __init__(self, parts, looks):
        self.spec, self.model, self.looks = parts.spec, parts.core, looks
        dataset = nora.NoraDataset(parts.data.validation + parts.data.train[:1], parts.spec)
        self.known = {i["images"][0].tobytes(): i["action"] for i in (dataset[(0, n)] for n in range(len(dataset)))}

    def decode(self, images, prompts):
        chunks = [self.known[k[0].tobytes()] * 0.9 if self.looks else np.zeros((3, 6)) for k in images]
        return np.stack(chunks), np.zeros(len(chunks))


ALONE = types.SimpleNamespace(rank=0, world=1, device=CPU, sum=lambda *x: x, gathered=contextlib.nullcontext)


def test_a_policy_that_does_not_look_is_told_apart_per_camera(parts):
    """One answers from camera1 alone, one from nothing: camera3 changes nothing for either."""
    two, one = parts.data.validation + parts.data.train[:1], parts.data.validation
    two, one = (nora.NoraDataset(episodes, parts.spec) for episodes in (two, one))
    cfg = dataclasses.replace(parts.cfg, val_samples=24, val_decode_samples=24)
    for looks in (True, False):
        said = []
        v = nora.validate(Swapped(parts, looks), two, parts.collate, cfg, ALONE)
        line = nora.tell(v, said.append)
        assert v["val_swap_ratio_camera3"] == pytest.approx(1) and "swap_ratio_camera3 1.00" in line
        assert (v["val_swap_ratio_camera1"] > 1.5) == looks
        assert ["camera1" in text for text in said] == [False] if looks else [True, False]
    alone = nora.validate(Swapped(parts, True), one, parts.collate, cfg, ALONE)
    assert not any("swap" in key for key in alone), "with one episode there is nothing to swap with"
    # metres and radians are not averaged: each dim is measured by its own range
    moves, names = ~parts.spec.normalizer.constant, [f"val_mae_{n}" for n, _ in parts.spec.contract.actions]
    mae = np.array([alone[n] for n in names])[moves]
    assert mae.min() > 0 and alone["val_action_mae"] == pytest.approx((mae / parts.spec.normalizer.half[moves]).mean())


def test_the_policy_says_what_it_takes_and_gives(tmp_path, base, insertion_root):
    """Of a run with the state in the prompt, whose folder tells how it was made."""
    flags = [*base, "--state_in_prompt", "--use_qpos", "--output_dir", tmp_path, "--max_steps", 1]
    run(flags)
    expected = "config.yaml train_nora.py dataset_stats.json validation_episodes.txt metrics.jsonl steps_1"
    assert set(expected.split()) <= {p.name for p in tmp_path.iterdir()}
    assert parse_config(nora.Config, ["--config", str(tmp_path / "config.yaml")], nora.ALIASES) == config(flags)
    policy = nora.load_policy(tmp_path, "cpu")
    about = json.loads(json.dumps(policy.describe()))
    assert about["cameras"] == {c: dict(height=60, width=80) for c in ("camera1", "camera3")}
    assert about["recorded"] == {"camera1": "side_camera", "camera3": "top_camera"}
    assert [c["name"] for c in about["actions"]] == ["dx", "dy", "dz", "droll", "dpitch", "dyaw"]
    assert about["actions"][0]["unit"] == "mm" and about["actions"][0]["low"] < about["actions"][0]["high"]
    assert (about["kind"], about["horizon"]) == ("delta", 3) and about["rate_hz"] == pytest.approx(14.9, rel=0.01)
    assert "the motion to the next frame" in about["first_row"] and about["latency_ms"] > 0
    assert len(about["state"]) == 12 and about["instructions"] and about["needs"] == {}
    seen = next(iter(policy.open_episodes(insertion_root)))["sample"](2)
    text = policy.model.processor.text("go", policy.spec.state_normalizer.normalize(seen["state"]))
    assert len(text.split(" State: ")[1].split("<|im_end|>")[0].split()) == 12
    assert policy.predict([seen]).shape == (1, 3, 6)
    with pytest.raises(UserError, match=r"state has shape \(6,\)"):
        policy.predict([seen | dict(state=seen["state"][:6])])


def test_compute_stats_gives_the_numbers_that_training_uses(tmp_path, base):
    words = f"--dataset.root_dir {base[1]} --use_ee_pose_delta_as_action --num_val_episodes 1 --output".split()
    compute_stats.main(parse_config(compute_stats.Config, [*words, str(tmp_path / "s/s.json")]))
    own = nora.load_data(config(base)).spec.stats
    stats = nora.load_data(config(base, "--normalization_stats_path", tmp_path / "s/s.json")).spec.stats
    assert stats["action"] == own["action"] and stats["excluded_episodes"] == own["excluded_episodes"]
    stats_flags = ["--normalization_stats_path", tmp_path / "s/s.json", "--state_in_prompt", "--use_qpos"]
    for flags in ([], ["--use_ee_pose", "false"]):  # 12 dims, and 6 others than in the file
        with pytest.raises(UserError, match="state, 6 dims, is not qpos.* Make the file with the same"):
            nora.load_data(config(base, *stats_flags, *flags))
    argv = [sys.executable, compute_stats.__file__, *words, tmp_path / "s/s.json/no_folder.json"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 2 and "File exists" in done.stderr and "Traceback" not in done.stderr


def test_it_starts_without_wandb_torchvision_and_peft(tmp_path, base):
    """None of them is needed for a full training; a broken torchvision must not matter either."""
    for name in ("wandb", "torchvision", "peft"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "__init__.py").write_text(f"raise RuntimeError('{name} is broken')")
    shell(base, "--output_dir", tmp_path / "run", "--max_steps", 1, env={"PYTHONPATH": str(tmp_path)})
