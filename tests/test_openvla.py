"""OpenVLA on VAMOS: parity with what the original implementation computed (../shared/fixtures), the data reader, the
training's promises, the exported directory."""

import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import common.run
import evaluate
import make_demo
import modeling_openvla
import train_openvla_vamos as openvla
from common import UserError
from common.log import read_metrics

ROOT = Path(openvla.__file__).resolve().parent
FLAGS = dict(lora_rank=4, batch_size=4, max_steps=4, log_steps=1, save_steps=100, val_steps=100, val_samples=5)
FLAGS |= dict(num_workers=0, learning_rate=1e-2)
PATH = "data/train-0.parquet"
pytestmark = pytest.mark.usefixtures("no_plot")


# ---- parity with the original ----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def original(shared, base_dir, tmp_path_factory):
    """What OpenVLA's own class saved and computed: (folder of the model, {name: array}). Its config leaves the sizes of
    the towers to timm, and it has no tokenizer."""
    folder = tmp_path_factory.mktemp("original") / "model"
    shutil.copytree(shared / "fixtures/openvla_hf/model", folder)
    shutil.copy(base_dir / "tokenizer.json", folder)
    shutil.copy(base_dir / "tokenizer_config.json", folder)
    config = json.loads((folder / "config.json").read_text())
    config["vision_sizes"] = json.loads((shared / "fixtures/openvla_hf/vision_sizes.json").read_text())
    (folder / "config.json").chmod(0o644)
    (folder / "config.json").write_text(json.dumps(config))
    return folder, dict(np.load(shared / "fixtures/openvla_hf/io.npz"))


@pytest.fixture(scope="module")
def vla(original):
    return openvla.load_vla(original[0], torch.device("cpu"), torch.float32)


def test_tensors_pictures_features_logits_and_loss_equal_the_original(original, vla, shared):
    folder, values = original
    lines = (shared / "fixtures/openvla_hf/params.txt").read_text().splitlines()
    ours, file = vla.state_dict(), load_file(folder / "model.safetensors")
    assert {k: str(tuple(v.shape)) for k, v in ours.items()} == dict(line.split("\t")[:2] for line in lines)
    assert ours.keys() == file.keys() and all(torch.equal(ours[k], v) for k, v in file.items())
    processor = openvla.read_folder(folder)[1].image_processor
    pictures = processor([Image.fromarray(image) for image in values["images"]])["pixel_values"]
    np.testing.assert_allclose(pictures, values["pixel_values"], atol=1e-6)
    names = ("input_ids", "attention_mask", "pixel_values", "labels")
    inputs = {name: torch.from_numpy(values[name]) for name in names}
    with torch.no_grad():
        features, out = vla.vision_backbone(inputs["pixel_values"]), vla(**inputs)
        projected = vla.projector(features)
    np.testing.assert_allclose(features[:, ::16], values["vision_features"], atol=1e-4)
    np.testing.assert_allclose(projected[:, ::16], values["projector_features"], atol=1e-4)
    np.testing.assert_allclose(out.logits[:, 256:, 31700:32064], values["logits_last_text"], atol=1e-4)
    assert out.loss.item() == pytest.approx(float(values["loss"]), abs=1e-4)


def test_predicted_actions_equal_the_original(original, vla):
    values = original[1]
    prompts, pixels = (torch.from_numpy(values[name]) for name in ("predict_prompts", "pixel_values"))
    together = vla.predict_action(input_ids=prompts, pixel_values=pixels, unnorm_key="vamos_dataset", do_sample=False)
    np.testing.assert_array_equal(together, values["predict_actions"])
    np.testing.assert_array_equal(vla.generate_action_ids(prompts.tolist(), pixels, 2), values["generated_ids"])
    for b in range(3):  # one at a time, with the alias, and with the empty token already there
        longer = torch.tensor([[*prompts[b].tolist(), modeling_openvla.EMPTY_TOKEN]])
        one = vla.predict_action(input_ids=prompts[b : b + 1], pixel_values=pixels[b : b + 1], unnorm_key="vamos")
        more = vla.predict_action(input_ids=longer, pixel_values=pixels[b : b + 1], unnorm_key="vamos")
        assert one.shape == (2,) and one.dtype == np.float64
        np.testing.assert_array_equal(one, values["predict_actions"][b])
        np.testing.assert_array_equal(more, one)
    for key in ("bridge", None):  # None is an answer only where there is one data set
        with pytest.raises(ValueError, match=f"'?{key}'?.*other, vamos_dataset"):
            vla.predict_action(input_ids=prompts, pixel_values=pixels, unnorm_key=key)


def test_bins_that_tie_in_bf16_are_told_apart(base_dir):
    vla = openvla.build_model(openvla.Config(), base_dir, "cpu", torch.bfloat16).base_model.model
    head, hidden = vla.language_model.lm_head, torch.ones(1, vla.config.text_config.hidden_size, dtype=torch.bfloat16)
    head.weight.data.fill_(1)[vla.action_begin + 7, 0] += 2**-7
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert head(hidden)[0, vla.action_begin : vla.action_end].argmax() == 0  # a tie of all
        assert vla.action_logits(hidden).argmax() == 7
    side, asked = vla.config.image_sizes[0], []
    head.register_forward_hook(lambda *_: asked.append(torch.is_grad_enabled()))
    vla.bfloat16().generate_action_ids([[1, 2]], torch.zeros(1, 6, side, side, dtype=torch.bfloat16), 2)
    assert asked == [False, False]  # an answer keeps no graph


def test_real_size_has_the_public_names_and_upstreams_lora_layers(shared):
    shapes = json.loads((shared / "fixtures/openvla7b_keys.json").read_text())
    with torch.device("meta"):
        model = modeling_openvla.OpenVLAForActionPrediction(modeling_openvla.OpenVLAConfig())
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == shapes and len(shapes) == 982
    assert sum(p.numel() for p in model.parameters()) == 7_541_237_184
    used = openvla.lora_layers(model)
    assert len(used) == 439 - 13  # upstream's without those that get no gradient
    assert not any(".blocks.26." in n or ".attn_pool." in n or ".featurizer.blocks.23." in n for n in used)


def test_a_foreign_directory_is_refused(base_dir, tmp_path):
    tokenizer = json.loads((base_dir / "tokenizer.json").read_text())
    unknown = dict(model_type="openvla", timm_model_ids=["a", "b"])
    for file, content, message in (
        ("config.json", dict(model_type="llama"), "'llama', not 'openvla'"),
        ("config.json", unknown, "sizes of tower 'a' are unknown"),
        ("preprocessor_config.json", dict(image_resize_strategy="crop", input_sizes=[]), "strategy is 'crop'"),
        ("tokenizer.json", tokenizer | dict(post_processor=None), "a text begins with id .*expected '▁' and BOS"),
        ("tokenizer_config.json", ["cut"], "lacks a file, or has one that is damaged .*Copy or download it again"),
        ("tokenizer.json", None, "has no tokenizer.json: expected a directory in OpenVLA's format"),
    ):
        shutil.copytree(base_dir, tmp_path / "model")
        (tmp_path / "model" / file).unlink()
        if content:
            (tmp_path / "model" / file).write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            openvla.read_folder(tmp_path / "model")
        shutil.rmtree(tmp_path / "model")


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("openvla") / "tiny"
    return make_demo.write_openvla(folder, text=(16, 2), dino=(16, 2), siglip=(24, 2), image_size=42)


@pytest.fixture(scope="session")
def vamos_root(tmp_path_factory):
    """2 training files of row groups of 4, one validation file."""
    folder = tmp_path_factory.mktemp("vamos")
    make_demo.write_vamos(folder, images=14, validation_images=5, size=(48, 64), files=2, rows_per_group=4)
    return folder


def config(**flags):
    return openvla.Config(**{k: str(v) if isinstance(v, Path) else v for k, v in (FLAGS | flags).items()})


@pytest.fixture
def make(tmp_path, base_dir, vamos_root):
    """make(**flags) -> Config of a tiny run below tmp_path."""
    paths = dict(vla_path=base_dir, data_root_dir=vamos_root, run_root_dir=tmp_path / "runs")
    paths |= dict(adapter_tmp_dir=tmp_path / "adapter", frame_dir=tmp_path / "frames")
    return lambda **flags: config(**paths | flags)


def folders(cfg):
    return Path(cfg.run_root_dir) / openvla.exp_id(cfg), Path(cfg.adapter_tmp_dir) / openvla.exp_id(cfg)


def train(cfg):
    """Run main -> (newest adapter {name: tensor}, metrics rows)."""
    openvla.main(cfg)
    run, adapter = folders(cfg)
    return openvla.read_adapter(adapter), read_metrics(run / "log")


def close(a, b, atol=0.0):
    torch.testing.assert_close(dict(a), dict(b), rtol=0, atol=atol)


def items_of(rows, processor, targets=1):
    return openvla.VamosDataset(rows, lambda path, row: openvla.picture_reader(path, processor.resize)(row), targets)


def batch_of(cfg, indices=range(4), targets=1):
    """(LossModel with a LoRA whose B is not zero, policy, dataset, batch)"""
    data, folder = openvla.load_data(cfg), Path(cfg.vla_path)
    vla = openvla.build_model(cfg, folder, torch.device("cpu"), torch.float32).get_base_model()
    torch.manual_seed(1)
    with torch.no_grad():
        for n, p in vla.named_parameters():
            if "lora_B" in n:
                p.normal_(0, 0.2)
    _, processor = openvla.read_folder(folder)
    policy = openvla.Policy(vla, processor, data.stats, data.spec)
    dataset = items_of(data.train, processor.image_processor, targets)
    core = openvla.LossModel(vla, processor.image_processor)
    return core, policy, dataset, policy.collate([dataset[(i, i)] for i in indices])


# ---- reading parquet -------------------------------------------------------------------------------------------------
def picture(color=(200, 30, 30), form="JPEG", mode="RGB"):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), color).convert(mode).save(buffer, form)
    return buffer.getvalue()


def write(path, rows, struct=True, group=3):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if struct else pa.binary()
    schema = [("image", image), ("trajectory_3d", pa.list_(pa.list_(pa.float64())))]
    schema += [("lang_goal", pa.string()), ("text", pa.string())]
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(schema)), path, row_group_size=group)


def row(path=((0, 0, 0), (1, 1, 0)), lang="Go", text=None, image=None, struct=True):
    image = picture() if image is None else image
    return dict(image=dict(bytes=image, path=None) if struct else image, trajectory_3d=path, lang_goal=lang, text=text)


def test_steps_by_hand_with_everything_that_can_be_wrong(tmp_path):
    nan = float("nan")
    paths = [[[0, 0, 0], [1, 2, 0], [3, 3, 9]], [], None, [[5, 5, 5]]]
    paths += [[[0, 0, 0], [nan, 1, 0], [2, 2, 0], [3, 4, 0]], [[1, 1], [2, 4]], [[0, 0, 0], [1], [2, 2, 0], [2, 3, 0]]]
    paths += [[[0, 0, 0], None, [1, 1, 0]], [[0.0, 0, 0], [float("inf"), 0, 0]], [[0.0, 0], [1e39, 0], [1e39, 1]]]
    write(tmp_path / PATH, [row(p) for p in paths])
    rows, bad = openvla.read_rows([tmp_path / PATH], openvla.Config())
    np.testing.assert_array_equal(rows.actions, [[1, 2], [2, 1], [1, 2], [1, 3], [0, 1], [0, 1]])
    assert not bad and rows.step.tolist() == [0, 1, 2, 0, 2, 1] and rows.row_of.tolist() == [0, 0, 4, 5, 6, 9]
    assert dict(rows.counts) == dict(rows=10, short=3, nonfinite=2 + 2 + 2 + 1 + 1)
    write(tmp_path / PATH, [row([[0, 0, 0], [1, 2, 0], [2, 3, 0], tail]) for tail in ([9.0, 9, 0], [2.0, -4, 0])])
    later, _ = openvla.read_rows([tmp_path / PATH], openvla.Config())  # what comes later changes no earlier step
    np.testing.assert_array_equal(later.actions, [[1, 2], [1, 1], [7, 6], [1, 2], [1, 1], [0, -7]])
    write(tmp_path / PATH, [row(p) for p in paths])
    first, _ = openvla.read_rows([tmp_path / PATH], openvla.Config(samples="first", trajectory_hz=10))
    # metres per second; a path whose first step is not finite has no first step
    np.testing.assert_array_equal(first.actions, [[10, 20], [10, 30]])
    assert first.counts["nonfinite"] == 5


def test_pictures_as_struct_or_bytes_in_any_mode(tmp_path, monkeypatch):
    monkeypatch.setattr(pq.ParquetFile, "read", None)  # pyarrow cannot where a row group has structs of 2 GB
    kinds = [picture(), picture(form="PNG"), picture(form="PNG", mode="RGBA"), picture(form="PNG", mode="L")]
    kinds += [picture(mode="CMYK")]
    processor = modeling_openvla.PrismaticImageProcessor(input_sizes=[[3, 28, 28]] * 2)
    for struct in (True, False):
        write(tmp_path / PATH, [row(image=k, struct=struct) for k in kinds], struct)
        read = openvla.picture_reader(tmp_path / PATH, processor.resize)
        for r in (0, 1, 2, 4):
            assert read(r).shape == (28, 28, 3) and np.abs(read(r).astype(int) - (200, 30, 30)).max() < 6
        assert len({tuple(c) for c in read(3).reshape(-1, 3)}) == 1
    noise, buffer = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8), io.BytesIO()
    Image.fromarray(noise).resize((480, 320), Image.BICUBIC).save(buffer, "JPEG")  # which could be decoded smaller
    write(tmp_path / PATH, [row(image=buffer.getvalue())])
    expected = processor.resize(np.array(Image.open(buffer)))
    assert np.array_equal(openvla.picture_reader(tmp_path / PATH, processor.resize)(0), expected)


def test_missing_and_damaged_pictures_are_named_or_left_out(tmp_path, make, capsys):
    rows = [row([[0, 0, 0], [i, 1, 0]]) for i in range(6)]
    rows[1]["image"], rows[2]["image"] = dict(bytes=None, path="x.jpg"), None
    rows[3]["image"]["bytes"] = rows[3]["image"]["bytes"][:100]
    rows[4]["image"]["bytes"] = b""
    write(tmp_path / PATH, rows)
    flags = dict(data_root_dir=tmp_path, max_steps=1, batch_size=2)
    each = "".join(rf"\n.*row {i} .*" for i in (1, 2, 3, 4))
    with pytest.raises(UserError, match=rf"4 images cannot.*{each}\n.*--skip_bad_episodes"):
        openvla.main(make(**flags))  # at the start, and all of them
    many = SimpleNamespace(about=lambda _: dict(bad={i: f"row {i}" for i in range(25)}))
    with pytest.raises(UserError, match=r"^25 images(.*\n){20}row 19\nWrite"):  # a line for each fills no screen
        openvla.drop_bad_pictures(SimpleNamespace(table=pd.DataFrame(dict(path=["x"] * 25)), row_of=range(25)), many, 0)
    _, metrics = train(make(**flags, skip_bad_episodes=True))
    said = capsys.readouterr().out
    assert said.count("excluded  train-0.parquet: the image of row") == 4 and len(metrics) == 1
    stats = openvla.load_policy(folders(make(**flags))[0], "cpu").stats
    rows[5]["image"]["bytes"] = b"damaged since"
    write(tmp_path / PATH, rows)
    again = make(**flags | dict(max_steps=2), skip_bad_episodes=True, resume_from_checkpoint="auto")
    assert len(train(again)[1]) == 2, "the same run, without that image"
    policy = openvla.load_policy(folders(make(**flags))[0], "cpu")  # evaluation leaves out what the training did
    assert len(next(policy.open_episodes(tmp_path, [PATH]))["target"]) == 1 and policy.stats == stats


def test_an_unreadable_file_is_left_out_by_name(tmp_path, vamos_root, make):
    shutil.copytree(vamos_root / "data", tmp_path / "data")
    broken = tmp_path / "data/train-00000-of-00002.parquet"
    broken.write_bytes(broken.read_bytes()[:-40])
    data = openvla.load_data(make(data_root_dir=tmp_path, skip_bad_episodes=True))
    assert {p.name for p in data.train.table["path"]} == {"train-00001-of-00002.parquet"} and len(data.excluded) == 1
    policy = SimpleNamespace(spec=data.spec)
    names = [f"data/{broken.name}", "data/train-00001-of-00002.parquet"]  # as an evaluation with --episodes
    assert [e["name"] for e in openvla.Policy.open_episodes(policy, tmp_path, names)] == names[1:]
    pq.write_table(pa.table({"image": [b""], "path": [1]}), broken)
    with pytest.raises(UserError, match="no column 'trajectory_3d', or several; it has image, path"):
        openvla.load_data(make(data_root_dir=tmp_path))
    with pytest.raises(UserError, match="no train-.*.parquet in .*no such folder.*--data_root_dir"):
        openvla.load_data(make(data_root_dir=tmp_path / "nowhere"))


def test_instruction_column(tmp_path):
    points = ['Navigate to <point x="1" y="2">goal</point>', '<point x="3">', None]
    for column, lang, expected in (
        ("auto", ["Go left", None, " "], ("lang_goal", ["Go left", "text 1", "navigate"])),
        ("auto", points, ("text", ["text 0", "text 1", "navigate"])),
        ("text", ["Go left", "b", "c"], ("text", ["text 0", "text 1", "c"])),
        ("lang_goal", ["<point>", "b", "c"], ("lang_goal", ["<point>", "b", "c"])),
    ):
        write(tmp_path / PATH, [row(lang=lang[i], text=["text 0", "text 1", None][i]) for i in range(3)])
        rows, _ = openvla.read_rows([tmp_path / PATH], openvla.Config())
        assert (openvla.choose_instructions(rows, column), rows.table["instruction"].tolist()) == expected
    pq.write_table(pa.table(dict(image=[b""], trajectory_3d=[[[0, 0], [1, 0]]], text=[b"bytes"])), tmp_path / PATH)
    assert openvla.read_rows([tmp_path / PATH], openvla.Config())[0].table["text"].tolist() == ["bytes"]


def test_statistics_by_hand_and_only_from_training_files(tmp_path, make):
    write(tmp_path / PATH, [row([[0, 0, 0], [s, 7, 0]]) for s in np.arange(101.0)])
    write(tmp_path / "data/validation-0.parquet", [row([[0, 0, 0], [1e6, 1e6, 0]])])
    data = openvla.load_data(make(data_root_dir=tmp_path))
    a = data.stats["action"]
    expected = dict(q01=[1, 7], q99=[99, 7], mean=[50, 7], min=[0, 7], max=[100, 7], mask=[True, True])
    assert {k: a[k] for k in expected} == expected
    assert (data.stats["num_transitions"], data.stats["num_trajectories"], data.stats["unit"]) == (101, 101, "m/step")
    _, policy, _, _ = batch_of(make(data_root_dir=tmp_path), [0])
    config = policy.vla.config
    assert config.encode_actions([-1.0, 1.0, -5.0, 5.0, 0.0]).tolist() == [31999, 31744] * 2 + [31872]
    given = policy.collate.normalizer.normalize(np.array([[1.0, 7], [50, 7], [99, 7], [1e9, 7]]))
    back = policy.vla.unnormalize(config.decode_actions(config.encode_actions(given)), a)
    np.testing.assert_allclose(back, [[1, 7], [50, 7], [99, 7], [99, 7]], atol=98 / 255)
    write(tmp_path / PATH, [row([[0, 0], [1, 5.0 * (i == 0)]]) for i in range(400)])  # one jump: both quantiles are 0
    action = openvla.load_data(make(data_root_dir=tmp_path)).stats["action"]
    assert action["q01"] == [1, 0] and action["q99"] == [1, 5]


def test_a_row_gives_different_steps_of_its_path_by_position_alone(tmp_path):
    paths = [[[t * t, i, 0] for t in range(n)] for i, n in enumerate((5, 2, 1, 40))]
    write(tmp_path / PATH, [row(path) for path in paths])
    rows, _ = openvla.read_rows([tmp_path / PATH], openvla.Config())
    openvla.choose_instructions(rows, "lang_goal")
    look = lambda path, row: np.zeros((1, 1, 3), np.uint8)  # noqa: E731
    four, one = openvla.VamosDataset(rows, look, 4, seed=3), openvla.VamosDataset(rows, look)
    assert len(four) == 3 and len(one) == 4 + 1 + 39
    assert four[(0, 0)]["actions"][:, 0].tolist() == [1, 3, 5, 7] and four[(0, 0)]["name"][1] == "row 0 step 0 1 2 3"
    assert four[(9, 1)]["actions"].tolist() == [[1, 0]] and four[(9, 1)]["name"][1] == "row 1 step 0"
    drawn = [tuple(four[(p, 2)]["actions"][:, 0]) for p in range(200)]
    assert drawn == [tuple(four[(p, 2)]["actions"][:, 0]) for p in range(200)]
    assert all(len(set(steps)) == 4 for steps in drawn) and len(set(drawn)) > 190
    assert len({step for steps in drawn for step in steps}) == 39, "every step of the path comes up"
    other = openvla.VamosDataset(rows, look, 4, seed=4)
    assert drawn[:9] != [tuple(other[(p, 2)]["actions"][:, 0]) for p in range(9)]
    names = [one[(0, i)]["name"][1] for i in (0, 3, 4, 5)]
    assert names == ["row 0 step 0", "row 0 step 3", "row 1 step 0", "row 3 step 0"]


def test_augmentation_moves_colours_and_keeps_contours():
    image = np.random.default_rng(0).integers(60, 190, (9, 9, 3), np.uint8)
    one, other = (openvla.augment_image(image, openvla.generator_at(7, p, "augment")) for p in (3, 4))
    assert not np.array_equal(one, other) and np.corrcoef(image.sum(2).ravel(), one.sum(2).ravel())[0, 1] > 0.9


# ---- batch, loss, prediction -----------------------------------------------------------------------------------------
def test_batch_is_prompt_space_actions_end(make):
    _, policy, dataset, batch = batch_of(make())
    item, action = dataset[(0, 0)], policy.stats["action"]
    prompt = policy.processor.tokenizer(modeling_openvla.prompt_of(item["instruction"]))["input_ids"]
    ids, answer = batch["input_ids"][0].tolist(), batch["targets"][0].tolist()
    assert ids[: len(ids) - ids[::-1].index(2)] == [*prompt, 29871, *answer]
    assert answer[2] == 2 and all(31744 <= a < 32000 for a in answer[:2])
    decoded = policy.vla.unnormalize(policy.vla.config.decode_actions(answer[:2]), action)
    width = np.subtract(action["q99"], action["q01"]) / 255
    assert (np.abs(decoded - np.clip(item["actions"][0], action["q01"], action["q99"])) <= width).all()


def test_loss_and_metrics_on_three_rows_equal_those_of_the_full_logits(make):
    core, policy, _, batch = batch_of(make())
    labels, vla, config = torch.full_like(batch["input_ids"], -100), policy.vla, policy.vla.config
    for b, ids in enumerate(batch["input_ids"].tolist()):
        end = len(ids) - ids[::-1].index(2)
        labels[b, end - 3 : end] = batch["input_ids"][b, end - 3 : end]
    mask, pixels = (batch["input_ids"] != 32000).long(), core.image_processor.normalize(batch["images"])
    with torch.no_grad():
        full = vla(input_ids=batch["input_ids"], attention_mask=mask, pixel_values=pixels, labels=labels)
        out = core(batch)
    assert out["loss_sum"].item() / 12 == pytest.approx(full.loss.item(), rel=1e-5)
    np.testing.assert_allclose(out["sample_loss"].mean().item(), full.loss.item(), rtol=1e-5)
    # OpenVLA's own metrics
    shifted, mask = full.logits[:, vla.vision_backbone.patches : -1], labels[:, 1:] > 31743
    assert out["correct"].item() == (shifted.argmax(-1)[mask] == labels[:, 1:][mask]).sum().item()
    chosen = vla.action_begin + shifted[mask][:, vla.action_begin : vla.action_end].argmax(-1)
    apart = np.abs(config.decode_actions(chosen) - config.decode_actions(labels[:, 1:][mask])).sum()
    assert out["l1_sum"].item() == pytest.approx(apart, rel=1e-5)


def test_a_bf16_base_gives_the_gradients_of_an_fp32_adapter(make, base_dir):
    vla = openvla.build_model(make(), base_dir, torch.device("cpu"), torch.bfloat16).get_base_model()
    trained = {n: p for n, p in vla.named_parameters() if p.requires_grad}
    assert {p.dtype for n, p in vla.named_parameters() if n not in trained} == {torch.bfloat16}
    a = torch.cat([p.flatten() for n, p in trained.items() if "lora_A" in n])
    assert a.std().item() == pytest.approx(1 / 4, rel=0.02)  # N(0, 1 / r^2)
    reference, policy, _, batch = batch_of(make())
    for name, p in policy.vla.named_parameters():  # the same adapter on both, fp32 everywhere in the reference
        if name in trained:
            trained[name].data.copy_(p.data)
    with torch.autocast("cpu", torch.bfloat16):
        loss = openvla.LossModel(vla, reference.image_processor)(batch)["loss_sum"]
    loss.backward()
    assert loss.item() == pytest.approx(reference(batch)["loss_sum"].item(), rel=0.02)
    assert all(p.grad.dtype == torch.float32 for p in trained.values())  # every one is used


def gradients(core, *batches):
    """-> (sum of the losses, {parameter: gradient}) of batches, one after the other"""
    core.zero_grad()
    loss = sum((core(batch)["loss_sum"] for batch in batches), torch.zeros(()))
    loss.backward()
    return loss.item(), {n: p.grad for n, p in core.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_targets_of_one_picture_in_one_forward_equal_forwards_of_their_own(make, attention):
    """Rows of different prompts, with 16, 9, 5 and 1 targets; loss, gradient and every metric."""
    core, policy, dataset, _ = batch_of(make(), [0], targets=16)
    policy.vla.language_model.config._attn_implementation = attention
    items = [dataset[(i, i)] for i in range(4)]
    for k, count in enumerate((16, 9, 5, 1)):
        items[k]["actions"] = items[k]["actions"][:count]
    alone = [item | dict(actions=action[None]) for item in items for action in item["actions"]]
    together, alone = policy.collate(items), [policy.collate([item]) for item in alone]
    assert len(alone) == sum(together["counts"]) == 31 and len({len(item["instruction"]) for item in items}) > 1
    assert "answer" not in alone[0], "one target needs no mask: it is the causal one"
    ids, _, before = modeling_openvla.side_by_side([[1] * 62], [torch.full((16, 3), 31800)], policy.vla.config)
    assert ids.shape == (1, 62 + 48) and before.shape == (16, 3), "one prompt, 16 answers"
    loss, ours = gradients(core, together)
    expected, theirs = gradients(core, *alone)
    assert loss == pytest.approx(expected, rel=1e-5)
    norm = torch.stack([g.square().sum() for g in theirs.values()]).sum().sqrt()
    apart = torch.stack([(ours[n] - g).square().sum() for n, g in theirs.items()]).sum().sqrt()
    assert ours.keys() == theirs.keys() and len(ours) > 20 and apart < 1e-5 * norm
    with torch.no_grad():
        whole, single = core(together), [core(batch) for batch in alone]
    for name in ("correct", "l1_sum"):
        assert whole[name].item() == pytest.approx(sum(out[name].item() for out in single), rel=1e-5)
    each = np.split([out["sample_loss"].item() for out in single], (16, 25, 30))
    np.testing.assert_allclose(whole["sample_loss"], [part.mean() for part in each], rtol=1e-5)
    policy.vla.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2 has no mask for several answers.*'sdpa'"):
        core(together)


def test_gradient_checkpointing_changes_no_gradient(make):
    """Also not where the targets of a row share their image."""
    for targets in (1, 16):
        found = []
        for on in (False, True):
            core, _, _, batch = batch_of(make(gradient_checkpointing=on), targets=targets)
            found.append(gradients(core.train(), batch)[1])
        assert len(found[0]) > 20
        close(found[0], found[1], 1e-5)


class Answers:
    """The policy of a validation, with answers of a test's own: `look` maps an item to them."""

    def __init__(self, policy, look):
        self.collate, self.stats, self.look = policy.collate, policy.stats, look

    def answer(self, items):
        return np.stack([self.look(item) for item in items])


def test_validation_tells_a_model_that_looks_from_one_that_does_not(make, tmp_path, capsys):
    """An image has a color and a motion of its own; its second row, under another instruction, is no partner."""
    shown = []
    for i in range(8):
        path, image = [[0.0, 0, 0], [i, 1.0, 0]], picture((30 * i, 0, 0))
        shown += [row(path, "Go", image=image), row(path, "Turn", image=image)]
    write(tmp_path / PATH, shown)
    cfg = make(data_root_dir=tmp_path, val_samples=16, batch_size=16)
    core, policy, dataset, _ = batch_of(cfg, [0])
    run = common.run.Run(cfg, tmp_path, 16)
    sees = lambda item: np.float32([item["image"].mean() / 10 + 0.2, 1])  # noqa: E731
    ratio = openvla.validate(core, Answers(policy, sees), dataset, cfg, run)["val_swap_ratio"]
    assert ratio > 2 and "does not look" not in capsys.readouterr().out

    def summed(world):
        sums = []
        for rank in range(world):
            part = SimpleNamespace(**vars(run) | dict(rank=rank, world=world, sum=lambda *x: sums.append(x) or x))
            openvla.validate(core, Answers(policy, sees), dataset, dataclasses.replace(cfg, batch_size=4), part)
        return np.sum(sums, axis=0)

    np.testing.assert_allclose(summed(2), summed(1), rtol=1e-5)  # whatever the ranks, the same samples are swapped
    blind = lambda item: np.float32([3.6, 1])  # noqa: E731
    values = openvla.validate(core, Answers(policy, blind), dataset, cfg, run)
    assert values["val_swap_ratio"] == pytest.approx(1) and values["val_mae_vx"] == pytest.approx(2, abs=0.1)
    assert "warning: the model does not look at its images" in capsys.readouterr().out
    write(tmp_path / PATH, shown[:2])  # one image: nothing to swap
    dataset = items_of(openvla.load_data(cfg).train, policy.processor.image_processor)
    assert "val_swap_ratio" not in openvla.validate(core, Answers(policy, blind), dataset, cfg, run)


# ---- run, stop, resume, export ---------------------------------------------------------------------------------------


GUIDE = """--vla_path {base} --data_root_dir {data} --dataset_name vamos --run_root_dir {out}/runs
    --adapter_tmp_dir {out}/adapter-tmp --lora_rank 4 --batch_size 4 --grad_accumulation_steps 1 --learning_rate 5e-4
    --image_aug False --save_steps 2 --max_steps 4 --num_workers 0"""  # with small numbers
SNIPPET = """
import sys, json, numpy as np, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from PIL import Image

processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
vla = AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype=torch.float32, trust_remote_code=True).to("cpu")
image, instruction = Image.open(sys.argv[2]), "Go to the red post"
prompt = f"In: What action should the robot take to {instruction.lower()}?\\nOut:"
inputs = processor(prompt, image).to("cpu", dtype=torch.float32)
print(json.dumps(vla.predict_action(**inputs, unnorm_key="vamos_dataset", do_sample=False).tolist()))
assert "timm" not in sys.modules
"""


def test_the_guides_command_and_its_snippet(vamos_root, base_dir, tmp_path):
    """torchrun, 2 processes (gloo): the guide's files; the merged directory alone, in a fresh process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes", "1", "--nproc-per-node", "2"]
    guide = GUIDE.format(base=base_dir, data=vamos_root, out=tmp_path).split()
    command += [str(ROOT / "train_openvla_vamos.py"), *guide]
    how = dict(cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    done = subprocess.run(command, **how)
    assert done.returncode == 0, done.stderr[-3000:]
    name = "tiny+vamos+b4+lr-0.0005+lora-r4+dropout-0.0"
    run, adapter = tmp_path / "runs" / name, tmp_path / "adapter-tmp" / name
    files = "dataset_statistics.json config.json model.safetensors preprocessor_config.json tokenizer.json meta.json"
    assert {*files.split(), "log", "modeling_openvla.py"} <= {p.name for p in run.iterdir()}
    files = {"adapter_config.json", "adapter_model.safetensors", "steps_2", "steps_4", "best"}
    assert {p.name for p in adapter.iterdir()} == files
    assert (run / "log/loss.png").stat().st_size > 5000 and (run / "log/validation_episodes.txt").is_file()
    close(openvla.read_adapter(adapter), openvla.read_adapter(adapter / "steps_4"))
    assert [r["step"] for r in read_metrics(run / "log")] == [4, 4]
    assert len(list((tmp_path / "frames").glob("*.u8"))) == 3
    policy, moved = openvla.load_policy(run, "cpu"), tmp_path / "moved"
    image = next(policy.open_episodes(vamos_root))["sample"](0)["images"]["camera1"]
    Image.fromarray(image).save(tmp_path / "0.png")
    run.rename(moved)
    out = subprocess.run([sys.executable, "-c", SNIPPET, str(moved), str(tmp_path / "0.png")], **how)
    assert out.returncode == 0, out.stderr[-3000:]
    ours = policy.predict([dict(images={"camera1": image}, instruction="Go to the red post")])
    np.testing.assert_allclose(json.loads(out.stdout.splitlines()[-1]), ours[0, 0], rtol=1e-6)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, base_dir, vamos_root):
    """(config, run directory, adapter directory) of one finished run with every checkpoint merged."""
    out = tmp_path_factory.mktemp("trained")
    paths = dict(vla_path=base_dir, data_root_dir=vamos_root, run_root_dir=out / "runs", frame_dir=out / "frames")
    paths |= dict(adapter_tmp_dir=out / "adapter", val_steps=1)
    cfg = config(**paths, save_steps=2, save_latest_checkpoint_only=False, learning_rate=0.05)
    openvla.main(cfg)
    return cfg, *folders(cfg)


def test_merged_adapter_and_peft_model_predict_the_same(trained, base_dir):
    from peft import PeftModel

    _, run, adapter = trained
    a, b = openvla.load_policy(run, "cpu"), openvla.load_policy(adapter, "cpu")
    close(a.vla.state_dict(), b.vla.state_dict())
    plain = openvla.load_vla(base_dir, torch.device("cpu"), torch.float32)
    before = {k: v.clone() for k, v in plain.state_dict().items()}
    with_peft = PeftModel.from_pretrained(plain, adapter).eval()  # the guide's adapter_tmp_dir/<exp_id>
    texts, rng = ("Go to the red post", "stop", "Go to the blue post"), np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (50, 70, 3), np.uint8) for _ in texts]
    inputs = a.processor([modeling_openvla.prompt_of(text) for text in texts], pictures)
    assert torch.equal(a.processor("x", pictures[:1])["pixel_values"], inputs["pixel_values"][:1])
    with torch.no_grad():
        ours, theirs = (m(inputs["input_ids"], pixel_values=inputs["pixel_values"]).logits for m in (a.vla, with_peft))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    merged = a.vla.state_dict()
    changed = {name for name in before if not torch.equal(before[name], merged[name])}
    assert {"language_model.lm_head.weight", "vision_backbone.featurizer.patch_embed.proj.weight"} <= changed
    assert all(name.endswith(".weight") and "norm" not in name and "embed_tokens" not in name for name in changed)


def test_the_contract_of_a_policy_and_its_evaluation(trained, base_dir, vamos_root, tmp_path):
    """Sizes and instructions are those of the training; an adapter says which model it stands on."""
    _, run, adapter = trained
    merged, policy = openvla.load_policy(run, "cpu"), openvla.load_policy(adapter, "cpu")
    about = policy.describe()
    assert about | dict(needs={}, latency_ms=0) == merged.describe() | dict(latency_ms=0)
    assert about["needs"] == dict(base_model=str(base_dir)) and "Go to the red post" in about["instructions"]
    assert about["cameras"] == {"camera1": dict(height=48, width=64)} and about["skip"] == 0
    assert [a["name"] for a in about["actions"]] == ["v_x", "v_y"] and about["actions"][0]["unit"] == "m/step"
    assert (about["kind"], about["horizon"], about["rate_hz"]) == ("velocity", 1, None)
    broken = Path(shutil.copytree(adapter / "best", tmp_path / "broken"))
    for stats in ({}, {"vamos_dataset": None}, {"vamos_dataset": dict(action=policy.stats["action"] | dict(std=-1))}):
        (broken / "dataset_statistics.json").write_text(json.dumps(stats))
        with pytest.raises(UserError, match="dataset_statistics.json has no complete 'vamos_dataset'"):
            openvla.load_policy(broken, "cpu")
    words = ["--data", str(vamos_root), "--output", str(tmp_path), "--device", "cpu", "--plots", "0"]
    report = evaluate.main(["--checkpoint", str(run), *words])
    assert 0 < report["floor"]["relative"] < 0.5, "256 bins, and clipping"
    assert json.loads((tmp_path / "report.json").read_text())["units"] == dict(v_x="m/step", v_y="m/step")
    name = "data/validation-00000-of-00001.parquet"
    paths = pq.read_table(vamos_root / name)["trajectory_3d"].to_pylist()
    recorded = next(policy.open_episodes(vamos_root, [name]))["target"]
    np.testing.assert_allclose(recorded, [np.subtract(p[1], p[0])[:2] for p in paths], rtol=1e-6)
    assert not policy.contract.warned


def test_pictures_of_several_aspects_leave_the_size_open(tmp_path, make, monkeypatch):
    for i, size in enumerate([(40, 30), (30, 40)]):
        buffer = io.BytesIO()
        Image.new("RGB", size).save(buffer, "PNG")
        write(tmp_path / f"data/train-{i}.parquet", [row(image=b""), row(image=buffer.getvalue())])
        store = openvla.FrameStore(tmp_path / "frames", (2, 2, 3), [])
        resize = lambda image: np.array(image.convert("RGB").resize((2, 2)))  # noqa: E731
        cfg = make(data_root_dir=tmp_path, skip_bad_episodes=True, num_workers=1)
        data = openvla.load_data(cfg, store, resize, common.run.Run(cfg, tmp_path, 1))
        assert data.spec["picture_size"] == [[30, 40], None][i] and len(data.excluded) == i + 1
    parts, read = [], pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *a, **k: (parts.append(p) or p for p in read(*a, **k)))
    write(path := tmp_path / "data/train-2.parquet", [row(image=buffer.getvalue())] * 200, group=100)
    assert openvla.picture_size(openvla.read_rows([path], cfg)[0]) == [40, 30]
    assert len(parts) == 1, "the file is not read to its end"


def test_a_bf16_base_is_merged_in_fp32_and_rounded_once(trained, base_dir, tmp_path, monkeypatch):
    base, source, name = tmp_path / "base", tmp_path / "steps_4", "projector.fc2"
    shutil.copytree(base_dir, base)
    shutil.copytree(trained[2] / "steps_4", source)
    for file in base.glob("*.safetensors"):
        save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    meta = json.loads((source / "meta.json").read_text())
    meta["config"]["vla_path"] = "gone"
    (source / "meta.json").write_text(json.dumps(meta))
    by_hand = openvla.Config(merge=str(source), vla_path=str(base), run_root_dir=str(tmp_path))
    with pytest.raises(UserError, match=f"{base} holds other weights than those that this adapter was trained on"):
        openvla.main(by_hand)
    del meta["digest"]  # as before it was kept
    (source / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=f"'gone' is neither .*--merge {source} --vla_path DIR"):
        openvla.load_policy(source, "cpu")
    monkeypatch.delattr(openvla, "load_vla")  # a merge never holds the whole model
    openvla.main(by_hand)
    merged = next(tmp_path.glob("gone+*--4_chkpt"))
    weight = dict(openvla.read_tensors(base))[f"{name}.weight"].float()
    a, b = (openvla.read_adapter(source)[f"{name}.lora_{part}.default.weight"] for part in "AB")
    assert torch.equal(dict(openvla.read_tensors(merged))[f"{name}.weight"], (weight + b @ a).bfloat16())


def test_an_adapter_is_written_from_its_copy_not_from_the_model(base_dir, tmp_path):
    """Which is trained on meanwhile."""
    model = openvla.build_model(config(vla_path=base_dir), base_dir, torch.device("cpu"), torch.float32)
    names = [n for n, p in model.get_base_model().named_parameters() if p.requires_grad]
    trained = {n: torch.full_like(model.get_base_model().get_parameter(n), k) for k, n in enumerate(names)}
    openvla.save_adapter(tmp_path, dict(trained=trained, meta={}), model, {})
    close(openvla.read_adapter(tmp_path), {n: t.detach() for n, t in trained.items()})


def test_best_is_the_adapter_of_the_lowest_validation_loss(trained, make):
    cfg, run, adapter = trained
    losses = {r["step"]: r["val_loss"] for r in read_metrics(run / "log") if "val_loss" in r}
    best = json.loads((adapter / "best/meta.json").read_text())
    assert len(losses) == 4 and best["step"] == min(losses, key=losses.get)
    policy, data = openvla.load_policy(adapter / "best", "cpu"), openvla.load_data(cfg)
    images = policy.processor.image_processor
    core, dataset = openvla.LossModel(policy.vla, images), items_of(data.validation, images)
    again = openvla.validate(core, policy, dataset, cfg, common.run.Run(cfg, run, 4))
    assert again["val_loss"] == pytest.approx(losses[best["step"]], rel=1e-5)


def test_merges_during_the_run_and_by_hand(trained, make, vamos_root, tmp_path):
    cfg, run, adapter = trained
    apart = run.parent / f"{run.name}--2_chkpt"  # save_latest_checkpoint_only False
    weight = lambda folder: openvla.load_policy(folder, "cpu").vla.projector.fc1.weight  # noqa: E731
    assert torch.equal(weight(apart), weight(adapter / "steps_2")) and not torch.equal(weight(apart), weight(run))
    shutil.rmtree(apart)
    openvla.main(openvla.Config(merge=str(adapter / "steps_2")))
    assert torch.equal(weight(apart), weight(adapter / "steps_2"))
    with pytest.raises(UserError, match="adapter_config.json"):
        openvla.main(openvla.Config(merge=str(run)))
    weights = shutil.copytree(adapter / "best", tmp_path / "best") / "adapter_model.safetensors"
    whole = load_file(weights)
    save_file({name: tensor * np.nan for name, tensor in whole.items()}, weights)
    with pytest.raises(UserError, match="adapter_model.safetensors: .* not finite"):
        openvla.main(openvla.Config(merge=str(weights.parent)))
    save_file(whole, weights)
    for _ in range(2):  # half of a pair, then the whole pair
        save_file(dict(sorted(load_file(weights).items())[1:]), weights)
        with pytest.raises(UserError, match="its adapter lacks a tensor"):
            openvla.load_policy(weights.parent)
    seen, merge, columns, read = [], openvla.merge_adapter, [], pq.ParquetFile.iter_batches
    with pytest.MonkeyPatch.context() as m:  # the default: run_root_dir/EXP_ID is the newest merge, as in the guide
        m.setattr(openvla, "merge_adapter", lambda *which: seen.append(which) or merge(*which))
        m.setattr(pq.ParquetFile, "iter_batches", lambda *args, **how: columns.append(how) or read(*args, **how))
        cfg = make(save_steps=2, max_steps=5)
        openvla.main(cfg)
    run, adapter = folders(cfg)
    assert seen == [(adapter / f"steps_{n}", run) for n in (2, 4, 5)]
    assert columns == [dict(columns=["image"])] * (3 + 2), "images: each file once, and for the size of its first"


def test_exported_files_are_openvlas(trained, base_dir):
    read = lambda folder, name: json.loads((folder / name).read_text())  # noqa: E731
    run, new = trained[1], ("norm_stats", "auto_map")
    config, original = read(run, "config.json"), read(base_dir, "config.json")
    assert {k: v for k, v in config.items() if k not in new} == {k: v for k, v in original.items() if k not in new}
    assert read(run, "dataset_statistics.json") == config["norm_stats"]
    entry = config["norm_stats"]["vamos_dataset"]
    assert set(entry["action"]) == {"mean", "std", "min", "max", "q01", "q99", "mask"}
    assert type(entry["num_transitions"]) is type(entry["num_trajectories"]) is int
    assert config["auto_map"]["AutoModelForVision2Seq"] == "modeling_openvla.OpenVLAForActionPrediction"
    assert read(run, "tokenizer_config.json")["tokenizer_class"] == "LlamaTokenizer"
    used = "tvf_normalize_params"
    assert read(run, "preprocessor_config.json")[used] == read(base_dir, "preprocessor_config.json")[used]
    assert not [p.name for p in run.rglob(".tmp*")] + [p.name for p in run.rglob("merging")]


def test_a_merge_that_failed_is_made_up_for_by_a_resume(make, monkeypatch, capsys):
    """No room at step 2 and at the end; then an interruption between two of its files."""
    cfg, space, replace, moved = make(save_steps=2), openvla.ckpt.require_space, os.replace, []
    again, (run, adapter) = dataclasses.replace(cfg, resume_from_checkpoint="auto"), folders(cfg)

    def full(folder, needed):
        if "runs" in str(folder):
            raise openvla.ckpt.DiskFull(28, "no room")
        space(folder, needed)

    def die(source, target):
        moved.extend([source] if Path(source).parent.name == "merging" else [])
        if len(moved) == 4:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as m, pytest.raises(UserError, match="saved in .*steps_4, but not merged.*--resume"):
        m.setattr(openvla.ckpt, "require_space", full)
        openvla.main(cfg)
    assert "steps_2, but not merged" in capsys.readouterr().out
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(os, "replace", die)
        openvla.main(again)
    with pytest.raises(UserError, match="no meta.json|no complete model"):
        openvla.load_policy(run, "cpu")
    openvla.main(again)  # only merges
    close(openvla.load_policy(run, "cpu").vla.state_dict(), openvla.load_policy(adapter, "cpu").vla.state_dict())
    shutil.rmtree(adapter)  # the guide calls its folder temporary
    with pytest.raises(UserError, match="holds a trained model"):
        openvla.main(again)


def test_a_merged_model_is_trained_on_without_validation_files(trained, make, vamos_root, tmp_path):
    for file in (vamos_root / "data").glob("train-*"):  # and with the files directly in the root
        shutil.copy(file, tmp_path)
    cfg = make(vla_path=trained[1], data_root_dir=tmp_path, max_steps=2, val_steps=1, learning_rate=0.0)
    assert not any("val_loss" in r for r in train(cfg)[1]) and not (folders(cfg)[1] / "best").exists()
    close(*(openvla.load_policy(folder, "cpu").vla.state_dict() for folder in (trained[1], folders(cfg)[0])))
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):  # before the first step
        train(make(adapter_tmp_dir=tmp_path / "file", max_steps=1))


def test_exp_id_is_upstreams_and_the_learning_rate_is_known_by_hand():
    cfg = openvla.Config(vla_path="/models/openvla-7b/", batch_size=8, grad_accumulation_steps=2)
    assert openvla.exp_id(cfg) == "openvla-7b+vamos+b16+lr-0.0005+lora-r32+dropout-0.0"
    cfg = dataclasses.replace(cfg, use_quantization=True, run_id_note="x", image_aug=True)
    assert openvla.exp_id(cfg).endswith("+q-4bit--x--image_aug")
    cosine = dict(lr_schedule="cosine"), [1, 0.8536, 0.5, 0.1464, 0, 0]
    for flags, expected in (({}, [1] * 6), (dict(warmup_steps=2), [0.5, 1, 1, 1, 1, 1]), cosine):
        cfg = openvla.Config(learning_rate=1.0, max_steps=4, **flags)
        assert [openvla.lr_at(s, cfg) for s in (0, 1, 2, 3, 4, 1000)] == pytest.approx(expected, abs=1e-4)


def test_help_does_not_wait_for_transformers():
    """Which takes 3 s to import; nor do the parts of common that the script imports."""
    first = set()
    for path in (ROOT / "train_openvla_vamos.py", *(ROOT / "common").glob("*.py")):
        lines = [line.split()[1] for line in path.read_text().splitlines() if re.match(r"(import|from) ", line)]
        first |= {name.split(".")[0] for name in lines}
    assert "torch" in first and not {"transformers", "modeling_openvla", "peft", "wandb"} & first


def test_check_needs_no_weights(make, capsys, base_dir, tmp_path):
    folder = shutil.copytree(base_dir, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    openvla.main(make(check=True, vla_path=folder))
    said = capsys.readouterr().out
    for text in ("1 rows with fewer", "1 rows use the other", "targets   ", "clipping", "check passed"):
        assert text in said


def test_recordings_in_the_public_layout(shared, make, capsys):
    root = shared / "data/vamos"
    openvla.main(make(check=True, data_root_dir=root))
    assert "41 of 41 rows usable, 2243 samples" in capsys.readouterr().out
    _, metrics = train(make(data_root_dir=root, max_steps=2, val_samples=4, batch_size=2))
    assert [r["step"] for r in metrics if "train_loss" in r] == [1, 2] and [r for r in metrics if "val_mae_vx" in r]
