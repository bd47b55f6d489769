"""OpenVLA on VAMOS: parity with what the original implementation computed (../shared/fixtures), the data reader, the training's promises, the exported directory."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import evaluate
import make_demo
import modeling_openvla
import train_openvla_vamos as openvla
from common.config import parse_config
from common.runlog import read_metrics

ROOT = Path(openvla.__file__).resolve().parent
FLAGS = dict(
    lora_rank=4,
    batch_size=4,
    max_steps=4,
    log_steps=1,
    save_steps=100,
    val_steps=100,
    val_samples=5,
    num_workers=0,
    learning_rate=1e-2,
    shuffle_rows=8,
)


# ---- parity with the original ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original(shared):
    """What OpenVLA's own class saved and computed: (folder of the model, {name: array})."""
    return shared / "fixtures/openvla_hf/model", dict(np.load(shared / "fixtures/openvla_hf/io.npz"))


@pytest.fixture(scope="module")
def vla(original):
    return openvla.load_weights(openvla.read_config(original[0]), original[0], "cpu", torch.float32)


def tensors(io, *names):
    return [torch.from_numpy(io[name]) for name in names]


def test_every_tensor_of_the_original_finds_its_place(original, vla, shared):
    from safetensors.torch import load_file

    listed = {
        line.split("\t")[0]: line.split("\t")[1]
        for line in (shared / "fixtures/openvla_hf/params.txt").read_text().splitlines()
    }
    ours, file = vla.state_dict(), load_file(original[0] / "model.safetensors")
    assert {k: str(tuple(v.shape)) for k, v in ours.items()} == listed
    assert ours.keys() == file.keys() and all(torch.equal(ours[k], v) for k, v in file.items())


def test_image_processor_equals_the_original(original):
    settings = json.loads((original[0] / "preprocessor_config.json").read_text())
    ours = modeling_openvla.PrismaticImageProcessor(**settings)([Image.fromarray(i) for i in original[1]["images"]])[
        "pixel_values"
    ]
    np.testing.assert_allclose(ours, original[1]["pixel_values"], atol=1e-6)


def test_features_logits_and_loss_equal_the_original(original, vla):
    io = original[1]
    ids, mask, pixels, labels = tensors(io, "input_ids", "attention_mask", "pixel_values", "labels")
    with torch.no_grad():
        features = vla.vision_backbone(pixels)
        out = vla(input_ids=ids, attention_mask=mask, pixel_values=pixels, labels=labels)
        projected = vla.projector(features)
    np.testing.assert_allclose(features[:, ::16], io["vision_features"], atol=1e-4)
    np.testing.assert_allclose(projected[:, ::16], io["projector_features"], atol=1e-4)
    np.testing.assert_allclose(out.logits[:, 256:, 31700:32064], io["logits_last_text"], atol=1e-4)
    assert out.loss.item() == pytest.approx(float(io["loss"]), abs=1e-4)


def test_predicted_actions_equal_the_original(original, vla):
    io = original[1]
    prompts, pixels = tensors(io, "predict_prompts", "pixel_values")
    together = vla.predict_action(input_ids=prompts, pixel_values=pixels, unnorm_key="vamos_dataset", do_sample=False)
    np.testing.assert_array_equal(together, io["predict_actions"])
    np.testing.assert_array_equal(vla.generate_action_ids(prompts, pixels, 2), io["generated_ids"])
    for b in range(3):  # one at a time, with the alias, and with the empty token already there
        one = vla.predict_action(input_ids=prompts[b : b + 1], pixel_values=pixels[b : b + 1], unnorm_key="vamos")
        more = vla.predict_action(
            input_ids=torch.tensor([[*prompts[b].tolist(), openvla.EMPTY_TOKEN]]),
            pixel_values=pixels[b : b + 1],
            unnorm_key="vamos",
        )
        assert one.shape == (2,) and one.dtype == np.float64
        np.testing.assert_array_equal(one, io["predict_actions"][b])
        np.testing.assert_array_equal(more, one)
    with pytest.raises(ValueError, match="'bridge'.*other, vamos_dataset"):
        vla.predict_action(input_ids=prompts, pixel_values=pixels, unnorm_key="bridge")
    with pytest.raises(ValueError, match="other, vamos_dataset"):  # None is an answer only where there is one data set
        vla.predict_action(input_ids=prompts, pixel_values=pixels)
    with pytest.raises(ValueError, match="do_sample"):
        vla.predict_action(input_ids=prompts, pixel_values=pixels, unnorm_key="vamos", do_sample=True)


def test_real_size_has_the_public_names_and_upstreams_lora_layers(shared):
    public = json.loads((shared / "fixtures/openvla7b_keys.json").read_text())
    shapes = {k: tuple(v) for k, v in (public.items() if isinstance(public, dict) else public)}
    with torch.device("meta"):
        model = openvla.OpenVLAForActionPrediction(openvla.OpenVLAConfig())
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == shapes and len(shapes) == 982
    assert sum(p.numel() for p in model.parameters()) == 7_541_237_184
    sizes = {
        n: m.weight.shape[0] + m.weight[0].numel()
        for n, m in model.named_modules()
        if hasattr(m, "weight") and m.weight.ndim > 1
    }
    upstream, used = openvla.lora_layers(model, "all-linear"), openvla.lora_layers(model, "used")
    assert len(upstream) == 439 and 32 * sum(sizes[n] for n in upstream) == 110_828_288
    assert len(used) == 426 and not any(
        "blocks.23." in n and ".featurizer" in n or "blocks.26." in n or "attn_pool" in n for n in used
    )


def test_an_incomplete_or_foreign_checkpoint_is_refused(original, base_dir, tmp_path):
    from safetensors.torch import load_file, save_file

    config, name = openvla.read_config(base_dir), "projector.fc1.bias"
    everything = {k: v for file in base_dir.glob("*.safetensors") for k, v in load_file(file).items()}
    for changed, message in (
        ({k: v for k, v in everything.items() if k != name}, "missing"),
        (everything | {"extra": torch.zeros(1)}, "unknown"),
        (everything | {name: torch.zeros(3)}, "other shape"),
    ):
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=f"{message}.*Nothing was loaded"):
            openvla.load_weights(config, tmp_path, "cpu", torch.float32)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="not a complete model"):
        openvla.load_weights(config, tmp_path, "cpu", torch.float32)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="'llama', expected 'openvla'"):
        openvla.read_config(tmp_path)


# ---- tiny data and model ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory):
    return make_demo.write_openvla(
        tmp_path_factory.mktemp("openvla") / "tiny", text=(16, 2), dino=(16, 2), siglip=(24, 2), image_size=42
    )


@pytest.fixture(scope="session")
def vamos_root(tmp_path_factory):
    """2 training files of row groups of 4, one validation file."""
    folder = tmp_path_factory.mktemp("vamos")
    make_demo.write_vamos(folder, images=14, validation_images=5, size=(48, 64), files=2, rows_per_group=4)
    return folder


@pytest.fixture
def make(tmp_path, base_dir, vamos_root):
    """make(**flags) -> Config of a tiny run below tmp_path."""

    def make(**flags):
        base = FLAGS | dict(
            vla_path=base_dir,
            data_root_dir=vamos_root,
            run_root_dir=tmp_path / "runs",
            adapter_tmp_dir=tmp_path / "adapter",
        )
        return parse_config(
            openvla.Config, [word for k, v in (base | flags).items() for word in (f"--{k}", str(v))], openvla.ALIASES
        )

    return make


@pytest.fixture(autouse=True)
def no_plot(monkeypatch):
    """Drawing takes longer than a tiny run; test_the_guides_command looks at the real picture."""
    monkeypatch.setattr(openvla.runlog, "plot_loss", lambda *_: "")


def folders(cfg):
    return Path(cfg.run_root_dir) / openvla.exp_id(cfg), Path(cfg.adapter_tmp_dir) / openvla.exp_id(cfg)


def train(cfg):
    """Run main -> ({name: tensor} of adapter and moments of the newest steps_N, metrics rows)."""
    openvla.main(cfg)
    run, adapter = folders(cfg)
    return state_of(openvla.checkpoint_folder(adapter)), read_metrics(run / "log")


def state_of(folder):
    moments = torch.load(folder / "state.pt", weights_only=True)["moments"]
    return openvla.trained_state(openvla.read_adapter(folder)[0]) | {
        f"{n}/{k}": v for n, m in moments.items() for k, v in m.items()
    }


def close(a, b, atol=0.0):
    assert a.keys() == b.keys()
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=0, atol=atol, msg=lambda m, k=k: f"{k}: {m}")


def batch_of(cfg, indices=range(4)):
    """(LossModel with a LoRA whose B is not zero, policy, dataset, batch)"""
    data, folder = openvla.load_data(cfg), Path(cfg.vla_path)
    vla, _ = openvla.build_model(cfg, folder, torch.device("cpu"), torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for n, p in vla.named_parameters():
            if "lora_B" in n:
                p.normal_(0, 0.2)
    processor = openvla.PrismaticProcessor.from_pretrained(folder)
    policy = openvla.Policy(vla, processor, data.stats, data.spec)
    dataset = openvla.VamosDataset(data, data.train, processor.image_processor, cfg)
    return (
        openvla.LossModel(vla, processor.image_processor),
        policy,
        dataset,
        policy.collate([dataset[(i, i)] for i in indices]),
    )


# ---- reading parquet -------------------------------------------------------------------------------------------------


def picture(color=(200, 30, 30), form="JPEG", mode="RGB"):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), color).convert(mode).save(buffer, form)
    return buffer.getvalue()


def write(path, rows, struct=True, group=3, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if struct else pa.binary()
    schema = pa.schema(
        [("image", image), ("trajectory_3d", pa.list_(pa.list_(pa.float64()))), *((k, v) for k, v in columns.items())]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=group)


def row(path, lang=None, text=None, image=None, struct=True):
    image = picture() if image is None else image
    return dict(image=dict(bytes=image, path=None) if struct else image, trajectory_3d=path, lang_goal=lang, text=text)


TEXT = dict(lang_goal=pa.string(), text=pa.string())


def test_steps_by_hand_with_everything_that_can_be_wrong(tmp_path):
    nan = float("nan")
    paths = [
        [[0, 0, 0], [1, 2, 0], [3, 3, 9]],
        [],
        None,
        [[5, 5, 5]],
        [[0, 0, 0], [nan, 1, 0], [2, 2, 0], [3, 4, 0]],
        [[1, 1], [2, 4]],
        [[0, 0, 0], [1], [2, 2, 0], [2, 3, 0]],
        [[0, 0, 0], None, [1, 1, 0]],
        [[0.0, 0, 0], [float("inf"), 0, 0]],
    ]
    write(tmp_path / "data/train-0.parquet", [row(p, "Go", None) for p in paths], **TEXT)
    rows, bad = openvla.read_rows([tmp_path / "data/train-0.parquet"], openvla.Config())
    np.testing.assert_array_equal(rows.actions, [[1, 2], [2, 1], [1, 2], [1, 3], [0, 1]])
    assert not bad and rows.step.tolist() == [0, 1, 2, 0, 2] and rows.ends.tolist() == [2, 3, 4, 5]
    assert list(zip(rows.group, rows.row)) == [(0, 0), (1, 1), (1, 2), (2, 0)]
    assert dict(rows.counts) == dict(rows=9, short=3, unpictured=0, nonfinite=2 + 2 + 2 + 1)
    first, _ = openvla.read_rows([tmp_path / "data/train-0.parquet"], openvla.Config(samples="first", trajectory_hz=10))
    np.testing.assert_array_equal(
        first.actions, [[10, 20], [10, 30]]
    )  # metres per second; a path whose first step is not finite has no first step
    assert first.counts["nonfinite"] == 4


@hypothesis.given(
    st.lists(
        st.one_of(
            st.none(),
            st.lists(st.one_of(st.none(), st.lists(st.one_of(st.none(), st.floats(-9, 9)), max_size=4)), max_size=5),
        ),
        max_size=6,
    ),
    st.integers(0, 3),
)
def test_steps_equal_a_plain_loop(paths, cut):
    """Vectorised over a column, also over a slice of it, against a loop over its Python values."""
    column = pa.chunked_array([pa.array(paths, pa.list_(pa.list_(pa.float64())))]).slice(cut)
    expected = []
    for path in paths[cut:]:
        points = [
            [np.nan if v is None else v for v in p[:2]] if p and len(p) >= 2 else [np.nan, np.nan] for p in path or []
        ]
        expected += [np.subtract(b, a) for a, b in zip(points, points[1:])]
    lengths, steps = openvla.steps_of(column)
    assert lengths.tolist() == [len(p or []) for p in paths[cut:]]
    np.testing.assert_array_equal(steps, np.array(expected).reshape(-1, 2))


def test_pictures_as_struct_or_bytes_in_any_mode(tmp_path):
    kinds = [
        picture(),
        picture(form="PNG"),
        picture(form="PNG", mode="RGBA"),
        picture(form="PNG", mode="L"),
        picture(mode="CMYK"),
    ]
    for struct in (True, False):
        write(
            tmp_path / f"{struct}/data/train-0.parquet",
            [row([[0, 0, 0], [1, 1, 0]], "Go", image=k, struct=struct) for k in kinds],
            struct,
            **TEXT,
        )
        rows, _ = openvla.read_rows([tmp_path / f"{struct}/data/train-0.parquet"], openvla.Config())
        processor = modeling_openvla.PrismaticImageProcessor(input_sizes=[[3, 28, 28]] * 2)
        reader = openvla.PictureReader(processor.resize, processor.size, 2)
        for r in (0, 1, 2, 4):
            image = reader.read(rows.paths[0], int(rows.group[r]), int(rows.row[r]))
            assert image.shape == (28, 28, 3) and np.abs(image.astype(int) - (200, 30, 30)).max() < 6
        assert len({tuple(c) for c in reader.read(rows.paths[0], 1, 0).reshape(-1, 3)}) == 1


def test_missing_pictures_are_counted_and_damaged_ones_named(tmp_path):
    path = tmp_path / "data/train-0.parquet"
    rows = [row([[0, 0, 0], [1, 1, 0]], "Go") for _ in range(4)]
    rows[1]["image"], rows[2]["image"] = dict(bytes=None, path="x.jpg"), None
    rows[3]["image"]["bytes"] = rows[3]["image"]["bytes"][:100]
    write(path, rows, **TEXT)
    found, _ = openvla.read_rows([path], openvla.Config())
    assert found.counts["unpictured"] == 2 and list(zip(found.group, found.row)) == [(0, 0), (1, 0)]
    processor = modeling_openvla.PrismaticImageProcessor()
    with pytest.raises(
        ValueError, match=r"train-0.parquet: the picture of row 0 in row group 1 cannot be decoded.*--check_images"
    ):
        openvla.PictureReader(processor.resize, processor.size, 9).read(path, 1, 0)


def test_an_unreadable_file_stops_or_is_left_out_by_name(tmp_path, vamos_root, make, capsys):
    (tmp_path / "data").mkdir()
    for file in (vamos_root / "data").iterdir():
        (tmp_path / "data" / file.name).write_bytes(file.read_bytes())
    broken = tmp_path / "data/train-00000-of-00002.parquet"
    broken.write_bytes(broken.read_bytes()[:-40])
    with pytest.raises(
        ValueError, match="train-00000-of-00002.parquet: not a readable VAMOS file.*--skip_bad_episodes"
    ):
        openvla.load_data(make(data_root_dir=tmp_path))
    data = openvla.load_data(make(data_root_dir=tmp_path, skip_bad_episodes=True))
    openvla.describe(make(), data, print)
    assert [p.name for p in data.train.paths] == [
        "train-00001-of-00002.parquet"
    ] and "excluded" in capsys.readouterr().out
    pq.write_table(pa.table({"image": [b""], "path": [1]}), broken)
    with pytest.raises(ValueError, match="no column 'trajectory_3d'; it has image, path"):
        openvla.load_data(make(data_root_dir=tmp_path))
    with pytest.raises(FileNotFoundError, match="no train-.*.parquet in .*no such folder.*--data_root_dir"):
        openvla.load_data(make(data_root_dir=tmp_path / "nowhere"))


@pytest.mark.parametrize(
    "column, lang, expected",
    [
        ("auto", ["Go left", None, " "], ("lang_goal", ["Go left", "text 1", "navigate"])),
        (
            "auto",
            ['Navigate to <point x="1" y="2">goal</point>', '<point x="3">', None],
            ("text", ["text 0", "text 1", "navigate"]),
        ),
        ("text", ["Go left", "b", "c"], ("text", ["text 0", "text 1", "c"])),
        ("lang_goal", ["<point>", "b", "c"], ("lang_goal", ["<point>", "b", "c"])),
    ],
)
def test_instruction_column(tmp_path, column, lang, expected):
    write(
        tmp_path / "train-0.parquet",
        [row([[0, 0], [1, 1]], lang[i], ["text 0", "text 1", None][i]) for i in range(3)],
        **TEXT,
    )
    rows, _ = openvla.read_rows([tmp_path / "train-0.parquet"], openvla.Config())
    assert (openvla.choose_instructions(rows, column), rows.instruction) == expected


def test_statistics_by_hand_and_only_from_training_files(tmp_path, make):
    steps = np.arange(101.0)
    write(tmp_path / "data/train-0.parquet", [row([[0, 0, 0], [s, 7, 0]], "Go") for s in steps], **TEXT)
    write(tmp_path / "data/validation-0.parquet", [row([[0, 0, 0], [1e6, 1e6, 0]], "Go")], **TEXT)
    data = openvla.load_data(make(data_root_dir=tmp_path))
    a = data.stats["action"]
    assert (a["q01"], a["q99"], a["mean"], a["min"], a["max"], a["mask"]) == (
        [1, 7],
        [99, 7],
        [50, 7],
        [0, 7],
        [100, 7],
        [True, True],
    )
    assert (
        data.stats["num_transitions"] == 101
        and data.stats["num_trajectories"] == 101
        and data.stats["unit"] == "m/step"
    )
    _, policy, _, _ = batch_of(make(data_root_dir=tmp_path), [0])
    coded = policy.vla.decode_tokens(
        policy.vla.action_tokens(policy.collate.normalizer.normalize(np.array([[1.0, 7], [50, 7], [99, 7], [1e9, 7]])))
    )
    np.testing.assert_allclose(
        policy.vla.unnormalize(coded, data.stats["action"]), [[1, 7], [50, 7], [99, 7], [99, 7]], atol=98 / 255
    )


def test_the_later_path_changes_nothing_at_a_step(tmp_path, make):
    """Inputs are picture and instruction, the target of step t is p[t+1] - p[t]: another future is invisible."""
    seen = []
    for name, tail in (("a", [9.0, 9, 0]), ("b", [2.0, -4, 0])):
        write(tmp_path / name / "train-0.parquet", [row([[0, 0, 0], [1, 2, 0], [2, 3, 0], tail], "Go")] * 3, **TEXT)
        _, _, dataset, batch = batch_of(make(data_root_dir=tmp_path / name), [0, 1])
        seen.append((dataset[(0, 0)]["action"], dataset[(1, 1)]["action"], batch["images"], batch["input_ids"][:, :-3]))
        assert dataset[(2, 2)]["action"].tolist() == [tail[0] - 2, tail[1] - 3]
    assert all(np.array_equal(a, b) for a, b in zip(*seen))


def test_a_rare_jump_keeps_its_range(tmp_path, make):
    write(
        tmp_path / "train-0.parquet", [row([[0, 0], [1, 5.0 * (i == 0)]], "Go") for i in range(400)], group=200, **TEXT
    )
    data = openvla.load_data(make(data_root_dir=tmp_path))
    assert data.stats["action"]["q01"] == [1, 0] and data.stats["action"]["q99"] == [1, 5]  # both quantiles are 0


# ---- order -----------------------------------------------------------------------------------------------------------


def fake_rows(groups):
    """Rows without files: `groups` lists of samples per row."""
    file, counts = np.repeat(np.arange(len(groups)), [len(g) for g in groups]), np.array([c for g in groups for c in g])
    n = counts.sum()
    return openvla.Rows(
        [],
        file.astype(np.int32),
        np.zeros(len(file), np.int32),
        np.zeros(len(file), np.int32),
        [],
        [],
        np.cumsum(counts),
        np.zeros((n, 2), np.float32),
        np.zeros(n, np.int32),
        {},
    )


@hypothesis.given(
    st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=5), min_size=1, max_size=6),
    st.integers(0, 9),
    st.integers(1, 12),
    st.randoms(),
)
def test_every_epoch_is_a_permutation_in_windows_and_a_function_of_the_position(groups, seed, shuffle_rows, random):
    rows = fake_rows(groups)
    n, order = len(rows.actions), openvla.WindowOrder(rows, seed, shuffle_rows)
    sequence = [order.index(p) for p in range(2 * n)]
    assert sorted(sequence[:n]) == sorted(sequence[n:]) == list(range(n))
    again = openvla.WindowOrder(rows, seed, shuffle_rows)  # asked in another order, by another process
    positions = list(range(2 * n))
    random.shuffle(positions)
    assert all(again.index(p) == sequence[p] for p in positions)
    groups_seen = [int(rows.file[rows.locate(i)]) for i in sequence[:n]]
    largest = max(map(len, groups))
    for start in range(n):  # a group that is left is not needed again within an epoch, but for the window
        if groups_seen[start] in groups_seen[start + 1 :]:
            last = n - 1 - groups_seen[::-1].index(groups_seen[start])
            assert sum(len(groups[g]) for g in set(groups_seen[start : last + 1])) <= shuffle_rows + largest


def test_windows_mix_samples_and_pictures_are_read_once_per_window(make, monkeypatch):
    cfg = make(shuffle_rows=8)
    data = openvla.load_data(cfg)
    processor = openvla.PrismaticProcessor.from_pretrained(cfg.vla_path).image_processor
    dataset, order, opened = (
        openvla.VamosDataset(data, data.train, processor, cfg),
        openvla.WindowOrder(data.train, 0, 8),
        [],
    )
    real = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, g, columns: opened.append((g, columns)) or real(self, g, columns=columns),
    )
    sequence = [order.index(p) for p in range(len(dataset))]
    for p, i in enumerate(sequence):
        dataset[(p, i)]
    assert all(columns == ["image"] for _, columns in opened) and len(opened) <= len(data.train.groups()[0]) + 2
    assert np.mean(np.diff(sequence) == 1) < 0.2
    assert max(sum(len(column) for column, _ in dataset.reader._groups.values()), 0) <= 8 + 4


def test_augmentation_changes_colours_by_position_alone(make):
    cfg = make(image_aug=True)
    data = openvla.load_data(cfg)
    processor = openvla.PrismaticProcessor.from_pretrained(cfg.vla_path).image_processor
    plain, colored = (openvla.VamosDataset(data, data.train, processor, cfg, augment=a) for a in (False, True))
    assert np.array_equal(colored[(3, 5)]["image"], colored[(3, 5)]["image"]) and not np.array_equal(
        colored[(3, 5)]["image"], colored[(4, 5)]["image"]
    )
    before, after = plain[(3, 5)]["image"].astype(float), colored[(3, 5)]["image"].astype(float)
    assert np.corrcoef(before.sum(2).ravel(), after.sum(2).ravel())[0, 1] > 0.9  # colours move, contours stay


# ---- batch, loss, prediction -----------------------------------------------------------------------------------------


def test_action_tokens_of_known_values(vla):
    ids = vla.action_tokens(np.array([-1.0, 1.0, -5.0, 5.0, 0.0]))
    assert ids.tolist() == [31999, 31744, 31999, 31744, 31872]
    assert vla.decode_tokens([31999, 31744]).tolist() == pytest.approx([-254 / 255, 254 / 255])
    values = np.random.default_rng(0).uniform(-1, 1, 10_000)
    assert np.abs(vla.decode_tokens(vla.action_tokens(values)) - values).max() <= 1 / 255 + 1e-12


def test_batch_is_prompt_space_actions_end(make):
    _, policy, dataset, batch = batch_of(make())
    tokenizer, item = policy.processor.tokenizer, dataset[(0, 0)]
    ids = batch["input_ids"][0].tolist()
    answer = batch["targets"][:3].tolist()
    assert ids[: len(ids) - ids[::-1].index(2)] == [
        *tokenizer(openvla.prompt_of(item["instruction"]))["input_ids"],
        29871,
        *answer,
    ]
    assert answer[2] == 2 and all(31744 <= a < 32000 for a in answer[:2])
    action = policy.vla.unnormalize(policy.vla.decode_tokens(answer[:2]), policy.stats["action"])
    width = np.subtract(policy.stats["action"]["q99"], policy.stats["action"]["q01"]) / 255
    assert (
        np.abs(action - np.clip(item["action"], policy.stats["action"]["q01"], policy.stats["action"]["q99"])) <= width
    ).all()


def test_loss_on_three_rows_equals_the_full_loss(make):
    core, policy, _, batch = batch_of(make())
    labels = torch.full_like(batch["input_ids"], -100)
    for b, ids in enumerate(batch["input_ids"].tolist()):
        end = len(ids) - ids[::-1].index(2)
        labels[b, end - 3 : end] = batch["input_ids"][b, end - 3 : end]
    with torch.no_grad():
        full = policy.vla(
            input_ids=batch["input_ids"],
            attention_mask=(batch["input_ids"] != 32000).long(),
            pixel_values=core.image_processor.normalize(batch["images"]),
            labels=labels,
        )
        out = core(batch)
    assert out["loss"].item() / 12 == pytest.approx(full.loss.item(), rel=1e-5)
    shifted = full.logits[:, policy.collate.patches : -1].argmax(-1)  # OpenVLA's own metrics
    mask = labels[:, 1:] > 31743
    assert out["correct"].item() == (shifted[mask] == labels[:, 1:][mask]).sum().item()
    np.testing.assert_allclose(out["sample_loss"].mean().item(), full.loss.item(), rtol=1e-5)


def test_l1_is_the_distance_of_the_decoded_bins(make, monkeypatch):
    core, policy, _, batch = batch_of(make())
    vla, shown = core.vla, {}
    real = vla.language_model.lm_head.forward
    monkeypatch.setattr(vla.language_model.lm_head, "forward", lambda x: shown.setdefault("logits", real(x)))
    out = core(batch)
    chosen = vla.action_begin + shown["logits"].view(4, 3, -1)[:, :2, vla.action_begin : vla.action_end].argmax(-1)
    expected = np.abs(vla.decode_tokens(chosen) - vla.decode_tokens(batch["targets"].view(4, 3)[:, :2])).sum()
    assert out["l1"].item() == pytest.approx(expected, rel=1e-5)


def test_padding_changes_no_loss_and_no_prediction(make):
    core, policy, dataset, batch = batch_of(make(), [0, 1])
    before = core(batch)["sample_loss"]
    b, t = batch["input_ids"].shape
    longer = batch | dict(input_ids=torch.nn.functional.pad(batch["input_ids"], (0, 7), value=32000))
    rows = batch["rows"].view(2, 3)
    longer["rows"] = (rows + torch.arange(2)[:, None] * 7).flatten()
    torch.testing.assert_close(core(longer)["sample_loss"], before, rtol=1e-5, atol=1e-6)
    items = [dataset[(i, i)] for i in range(4)]
    texts = [
        "go",
        "Go to the red post and then a good way further, slowly, along the wall",
        items[2]["instruction"],
        "x y z",
    ]
    together = policy.decode(np.stack([i["image"] for i in items]), texts)
    alone = np.concatenate([policy.decode(i["image"][None], [text]) for i, text in zip(items, texts)])
    np.testing.assert_array_equal(together, alone)  # other prompts in the batch, longer ones too, change nothing


def test_cached_decoding_equals_a_full_forward_per_token(make):
    _, policy, dataset, _ = batch_of(make())
    vla = policy.vla.eval()
    for i in range(6):
        item = dataset[(i, i)]
        pixels = policy.processor.image_processor.normalize(torch.from_numpy(item["image"][None]))
        ids = policy.collate.prompt_ids(item["instruction"])
        cached = vla.generate_action_ids(torch.tensor([ids]), pixels, 3)[0].tolist()
        for _ in range(3):
            with torch.no_grad():
                logits = vla(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[
                    0, -1, vla.action_begin : vla.action_end
                ]
            ids = [*ids, vla.action_begin + int(logits.argmax())]
        assert cached == ids[-3:]


def test_image_and_instruction_both_reach_the_action(make):
    core, policy, dataset, batch = batch_of(make())
    vla = policy.vla.eval()
    item = dataset[(0, 0)]
    pixels = lambda image: policy.processor.image_processor.normalize(torch.from_numpy(image[None]))  # noqa: E731
    logits = lambda image, text: (
        vla(input_ids=torch.tensor([policy.collate.prompt_ids(text)]), pixel_values=pixels(image))
        .logits[0, -1, vla.action_begin : vla.action_end]
        .detach()
    )  # noqa: E731
    here = logits(item["image"], "Go to the red post")
    assert (logits(np.zeros_like(item["image"]), "Go to the red post") - here).abs().max() > 0.01
    assert (logits(item["image"], "Go to the blue post") - here).abs().max() > 0.01
    assert torch.equal(
        logits(item["image"], "GO TO THE RED POST"), here
    )  # lower-cased in training and prediction alike


def test_only_the_adapter_trains_in_fp32_beside_a_bf16_base(make, base_dir):
    vla, _ = openvla.build_model(make(), base_dir, torch.device("cpu"), torch.bfloat16)
    trained = {n: p for n, p in vla.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n and p.dtype == torch.float32 for n, p in trained.items())
    assert {p.dtype for n, p in vla.named_parameters() if n not in trained} == {torch.bfloat16}
    assert all(p.abs().sum() == 0 for n, p in trained.items() if "lora_B" in n)
    a = torch.cat([p.flatten() for n, p in trained.items() if "lora_A" in n])
    assert a.std().item() == pytest.approx(1 / 4, rel=0.02)  # N(0, 1 / r^2)
    core = openvla.LossModel(vla, openvla.PrismaticProcessor.from_pretrained(base_dir).image_processor)
    reference, _, _, batch = batch_of(make())
    for name, p in reference.named_parameters():  # the same adapter on both, fp32 everywhere in the reference
        if name in (ours := dict(core.named_parameters())) and "lora_" in name:
            ours[name].data.copy_(p.data)
    with torch.autocast("cpu", torch.bfloat16):
        loss = core(batch)["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(reference(batch)["loss"].item(), rel=0.02)
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 for p in trained.values()
    )  # "used" means: every one gets a gradient


def test_gradient_checkpointing_changes_no_gradient(make):
    grads = []
    for on in (False, True):
        core, _, _, batch = batch_of(make(gradient_checkpointing=on, max_steps=1))
        core.train()
        core(batch)["loss"].backward()
        grads.append({n: p.grad for n, p in core.named_parameters() if p.grad is not None})
    assert len(grads[0]) > 20
    close(grads[0], grads[1], 1e-6)


# ---- run, stop, resume -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        dict(),
        dict(
            num_workers=2,
            grad_accumulation_steps=2,
            batch_size=3,
            lora_dropout=0.2,
            image_aug=True,
            lora_targets="all-linear",
        ),
    ],
    ids=["0-workers", "2-workers-accumulation-dropout-augmentation-all-linear"],
)
def test_a_stopped_and_resumed_run_equals_one_that_never_stopped(make, flags, monkeypatch, tmp_path):
    straight, rows_straight = train(make(run_root_dir=tmp_path / "a", adapter_tmp_dir=tmp_path / "aa", **flags))
    step = openvla.runlog.RunLog.step

    def kill_at_1(self, number, *args):
        step(self, number, *args)
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as m:
        m.setattr(openvla.runlog.RunLog, "step", kill_at_1)
        cfg = make(**flags)
        openvla.main(cfg)
    run, adapter = folders(cfg)
    assert (
        list(openvla.ckpt.steps_in(adapter)) == [2] and not (run / "config.json").exists()
    )  # the step during which the signal came is finished and saved
    with pytest.raises(FileNotFoundError, match="--merge"):
        openvla.load_policy(run, "cpu")
    resumed, rows = train(make(resume="auto", **flags))
    close(resumed, straight)
    pick = lambda rows: [
        (r["step"], r["train_loss"], r["action_accuracy"], r["l1_loss"]) for r in rows if "train_loss" in r
    ]  # noqa: E731
    assert pick(rows) == pick(rows_straight) and [r[0] for r in pick(rows)] == [1, 2, 3, 4]


def test_accumulation_equals_one_big_batch(make, tmp_path):
    one, rows = train(make(batch_size=4, max_steps=3, run_root_dir=tmp_path / "a"))
    two, rows_two = train(
        make(
            batch_size=1,
            grad_accumulation_steps=4,
            max_steps=3,
            run_root_dir=tmp_path / "b",
            adapter_tmp_dir=tmp_path / "bb",
        )
    )
    for a, b in zip(rows, rows_two):
        for key in ("train_loss", "grad_norm", "action_accuracy", "l1_loss", "val_loss", "val_mae_vx"):
            if key in a:
                assert b[key] == pytest.approx(a[key], rel=1e-3), key
    assert rows[0]["grad_norm"] == pytest.approx(rows_two[0]["grad_norm"], rel=1e-5) and len(rows) == 4


def guide_command(data, base, out, *more):
    """The command of the guide, with other paths and small numbers."""
    return [
        "--vla_path",
        str(base),
        "--data_root_dir",
        str(data),
        "--dataset_name",
        "vamos",
        "--run_root_dir",
        str(out / "runs"),
        "--adapter_tmp_dir",
        str(out / "adapter-tmp"),
        "--lora_rank",
        "4",
        "--batch_size",
        "4",
        "--grad_accumulation_steps",
        "1",
        "--learning_rate",
        "5e-4",
        "--image_aug",
        "False",
        "--save_steps",
        "2",
        "--max_steps",
        "4",
        "--num_workers",
        "0",
        *more,
    ]


SNIPPET = """
import sys, json, numpy as np, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from PIL import Image

processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
vla = AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype=torch.float32, trust_remote_code=True).to("cpu")
out = []
for name in sys.argv[2:]:
    image, instruction = Image.open(name), "Go to the red post"
    prompt = f"In: What action should the robot take to {instruction.lower()}?\\nOut:"
    inputs = processor(prompt, image).to("cpu", dtype=torch.float32)
    out.append([vla.predict_action(**inputs, unnorm_key=key, do_sample=False).tolist() for key in ("vamos_dataset", "vamos")])
assert "torchvision" not in sys.modules and "timm" not in sys.modules
print(json.dumps(out))
"""


def test_the_guides_command_with_two_processes_and_its_inference_snippet(
    vamos_root, base_dir, tmp_path, make, monkeypatch
):
    """torchrun (gloo): the listed files; the same weights and metrics as one process with twice the batch; the merged directory alone, in a fresh process."""
    monkeypatch.undo()
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nnodes",
        "1",
        "--nproc-per-node",
        "2",
        str(ROOT / "train_openvla_vamos.py"),
    ]
    done = subprocess.run(
        command + guide_command(vamos_root, base_dir, tmp_path),
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    name = "tiny+vamos+b4+lr-0.0005+lora-r4+dropout-0.0"
    run, adapter = tmp_path / "runs" / name, tmp_path / "adapter-tmp" / name
    assert {
        "dataset_statistics.json",
        "config.json",
        "model.safetensors.index.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "modeling_openvla.py",
        "meta.json",
        "log",
    } <= {p.name for p in run.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "steps_2", "steps_4"} == {
        p.name for p in adapter.iterdir()
    }
    assert {"metrics.jsonl", "loss.png", "config.yaml", "validation_episodes.txt"} <= {
        p.name for p in (run / "log").iterdir()
    } and (run / "log/loss.png").stat().st_size > 5000
    one = parse_config(
        openvla.Config, guide_command(vamos_root, base_dir, tmp_path / "one", "--batch_size", "8"), openvla.ALIASES
    )
    single, rows = train(one)
    close(
        {k: v for k, v in single.items() if "/" not in k},
        {k: v for k, v in state_of(adapter / "steps_4").items() if "/" not in k},
        1e-4,
    )  # the sum of two ranks rounds otherwise
    for a, b in zip(rows, read_metrics(run / "log")):
        assert a["step"] == b["step"] and all(
            b[k] == pytest.approx(a[k], rel=1e-3)
            for k in ("train_loss", "val_loss", "val_mae_vx", "val_mae_mean_action", "grad_norm")
            if k in a
        )
    assert len([r for r in rows if "val_loss" in r]) == 1
    policy = openvla.load_policy(run, "cpu")
    episode = next(policy.open_episodes(vamos_root))
    pictures, moved = [], tmp_path / "moved"
    for t in range(3):
        pictures.append(str(tmp_path / f"{t}.png"))
        Image.fromarray(episode["sample"](t)["images"]["camera1"]).save(pictures[-1])
    run.rename(moved)
    out = subprocess.run(
        [sys.executable, "-c", SNIPPET, str(moved), *pictures],
        cwd=tmp_path,
        env=os.environ | {"HF_HOME": str(tmp_path / "hf")},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert out.returncode == 0, out.stderr[-3000:]
    with_key, with_alias = np.array(json.loads(out.stdout.splitlines()[-1])).swapaxes(0, 1)
    ours = policy.predict(
        [dict(images={"camera1": Image.open(p)}, instruction="Go to the red post") for p in pictures]
    )[:, 0]
    np.testing.assert_allclose(with_key, ours, rtol=1e-6)
    np.testing.assert_array_equal(with_key, with_alias)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, base_dir, vamos_root):
    """(config, run directory, adapter directory) of one finished run with every checkpoint merged."""
    out = tmp_path_factory.mktemp("trained")
    flags = FLAGS | dict(
        vla_path=base_dir,
        data_root_dir=vamos_root,
        run_root_dir=out / "runs",
        adapter_tmp_dir=out / "adapter",
        save_steps=2,
        save_latest_checkpoint_only=False,
        learning_rate=0.05,
    )
    cfg = parse_config(openvla.Config, [word for k, v in flags.items() for word in (f"--{k}", str(v))])
    with pytest.MonkeyPatch.context() as m:
        m.setattr(openvla.runlog, "plot_loss", lambda *_: "")
        openvla.main(cfg)
    return cfg, *folders(cfg)


def test_merged_adapter_and_peft_model_predict_the_same(trained, base_dir):
    from peft import PeftModel

    cfg, run, adapter = trained
    a, b = openvla.load_policy(run, "cpu"), openvla.load_policy(adapter, "cpu")
    close(a.vla.state_dict(), b.vla.state_dict())
    plain = openvla.load_weights(openvla.read_config(base_dir), base_dir, "cpu", torch.float32)
    before = plain.state_dict()["language_model.lm_head.weight"].clone()
    with_peft = PeftModel.from_pretrained(
        plain, adapter
    ).eval()  # the guide's adapter_tmp_dir/<exp_id> is a peft adapter
    items = [
        dict(images={"camera1": np.random.default_rng(i).integers(0, 255, (50, 70, 3), np.uint8)}, instruction=t)
        for i, t in enumerate(("Go to the red post", "stop", "Go to the blue post"))
    ]
    np.testing.assert_array_equal(a.predict(items), b.predict(items))
    ids, mask = openvla.pad_right([a.collate.prompt_ids(i["instruction"]) for i in items], 32000)
    pixels = a.processor(["x"] * 3, [i["images"]["camera1"] for i in items])["pixel_values"]
    with torch.no_grad():
        np.testing.assert_allclose(
            a.vla(input_ids=ids, pixel_values=pixels).logits,
            with_peft(input_ids=ids, pixel_values=pixels).logits,
            atol=1e-4,
        )
    for name, base in (
        ("language_model.lm_head.weight", before),
        ("vision_backbone.featurizer.patch_embed.proj.weight", None),
    ):
        assert not torch.equal(
            a.vla.state_dict()[name], plain.state_dict().get(name, base if base is not None else torch.zeros(1))
        )
    assert not torch.equal(a.vla.state_dict()["language_model.lm_head.weight"], before)


def test_merging_is_exact_for_a_known_matrix():
    weight, a, b = torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[1.0, -1]]), torch.tensor([[2.0], [0.5]])
    assert openvla.merged("x.weight", weight, {"x": (a, b)}, 0.5).tolist() == [[2.0, 1.0], [3.25, 3.75]]
    assert openvla.merged("x.bias", weight, {"x": (a, b)}, 0.5) is weight
    conv = openvla.merged(
        "p.weight",
        torch.zeros(2, 3, 4, 4),
        {"p": (torch.ones(1, 3, 4, 4), torch.tensor([1.0, 2]).view(2, 1, 1, 1))},
        1.0,
    )
    assert conv[0].unique().tolist() == [1.0] and conv[1].unique().tolist() == [2.0]
    half = openvla.merged("x.weight", weight.bfloat16(), {"x": (a * 1e-3, b)}, 0.5)
    assert half.dtype == torch.bfloat16


def test_steps_hold_the_weights_after_their_update(trained, make):
    cfg, run, adapter = trained
    assert list(openvla.ckpt.steps_in(adapter)) == [2, 4]
    two, _ = train(make(max_steps=2, learning_rate=0.05))
    close(two, state_of(adapter / "steps_2"))
    chkpt = run.parent / f"{run.name}--2_chkpt"  # save_latest_checkpoint_only False
    assert torch.equal(
        openvla.load_policy(chkpt, "cpu").vla.projector.fc1.weight,
        openvla.load_policy(adapter / "steps_2", "cpu").vla.projector.fc1.weight,
    )
    assert not torch.equal(
        openvla.load_policy(chkpt, "cpu").vla.projector.fc1.weight,
        openvla.load_policy(run, "cpu").vla.projector.fc1.weight,
    )


def test_merge_by_hand_after_the_run(trained, tmp_path):
    import shutil

    cfg, run, adapter = trained
    chkpt = run.parent / f"{run.name}--4_chkpt"
    assert not chkpt.exists()
    openvla.main(dataclasses.replace(openvla.Config(), merge=str(adapter / "steps_4")))
    close(openvla.load_policy(chkpt, "cpu").vla.state_dict(), openvla.load_policy(run, "cpu").vla.state_dict())
    shutil.rmtree(chkpt)
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        openvla.main(dataclasses.replace(openvla.Config(), merge=str(run)))


def test_exported_files_are_openvlas(trained, base_dir):
    cfg, run, _ = trained
    config, original = json.loads((run / "config.json").read_text()), json.loads((base_dir / "config.json").read_text())
    assert {k: v for k, v in config.items() if k not in ("norm_stats", "auto_map")} == {
        k: v for k, v in original.items() if k != "norm_stats"
    }
    stats = json.loads((run / "dataset_statistics.json").read_text())
    assert list(stats) == ["vamos_dataset"] == list(config["norm_stats"]) and stats == config["norm_stats"]
    entry = stats["vamos_dataset"]
    assert set(entry["action"]) == {"mean", "std", "min", "max", "q01", "q99", "mask"} and all(
        len(v) == 2 for v in entry["action"].values()
    )
    assert type(entry["num_transitions"]) is type(entry["num_trajectories"]) is int
    assert (
        config["auto_map"]["AutoModelForImageTextToText"]
        == config["auto_map"]["AutoModelForVision2Seq"]
        == "modeling_openvla.OpenVLAForActionPrediction"
    )
    index = json.loads((run / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index.values()) == {p.name for p in run.glob("*.safetensors")} and len(set(index.values())) == 2
    assert json.loads((run / "tokenizer_config.json").read_text())["tokenizer_class"] == "LlamaTokenizer"
    assert (
        json.loads((run / "preprocessor_config.json").read_text())["tvf_normalize_params"]
        == json.loads((base_dir / "preprocessor_config.json").read_text())["tvf_normalize_params"]
    )
    assert not [p.name for p in run.rglob(".tmp*")] + [p.name for p in run.rglob("merging")]


def test_a_merged_model_can_be_trained_again(trained, make):
    _, run, _ = trained
    state, rows = train(make(vla_path=run, max_steps=1, learning_rate=0.0))
    fresh = openvla.load_policy(run, "cpu")
    again = openvla.load_policy(folders(make(vla_path=run, max_steps=1, learning_rate=0.0))[0], "cpu")
    close(fresh.vla.state_dict(), again.vla.state_dict())  # nothing learned, nothing lost


def test_load_model_weights_starts_a_new_run_from_an_adapter(trained, make):
    _, _, adapter = trained
    state, rows = train(make(load_model_weights=adapter / "steps_4", learning_rate=0.0, weight_decay=0.0, max_steps=1))
    old = openvla.trained_state(openvla.read_adapter(adapter / "steps_4")[0])
    close({k: v for k, v in state.items() if "/" not in k}, old)
    assert [r["step"] for r in rows if "train_loss" in r] == [1]


def test_a_resume_that_would_mean_something_else_is_refused(trained, tmp_path, vamos_root, make):
    cfg, _, adapter = trained
    step = str(adapter / "steps_4")
    more = dataclasses.replace(cfg, max_steps=6, resume_from_checkpoint=step)
    for changes, message in (
        (dict(seed=1), "seed 7, now it is 1"),
        (dict(lora_targets="all-linear"), "lora_targets used"),
        (dict(samples="first"), "other data or data settings"),
        (dict(shuffle_rows=3), "shuffle_rows 8"),
    ):
        with pytest.raises(ValueError, match=message):
            openvla.main(dataclasses.replace(more, **changes))
    with pytest.raises(FileExistsError, match="--resume auto"):
        openvla.main(cfg)
    with pytest.raises(FileNotFoundError, match="no state.pt"):
        openvla.main(make(resume=tmp_path))


def test_evaluate_on_the_validation_file(trained, vamos_root, tmp_path, capsys):
    _, run, adapter = trained
    report = evaluate.main(
        ["--checkpoint", str(run), "--data", str(vamos_root), "--output", str(tmp_path / "report"), "--device", "cpu"]
    )
    assert report["policy"]["per_dim"].keys() == {"v_x", "v_y"} and len(list((tmp_path / "report").glob("*.png"))) == 2
    said = capsys.readouterr().out
    assert "1 validation episodes" in said and "m/step" in said
    policy = openvla.load_policy(adapter, "cpu")
    records, tracks = evaluate.evaluate(policy, vamos_root, ["data/validation-00000-of-00001.parquet"], batch_size=3)
    expected = pq.read_table(vamos_root / "data/validation-00000-of-00001.parquet")["trajectory_3d"].to_pylist()
    np.testing.assert_allclose(tracks[0]["recorded"], [np.subtract(p[1], p[0])[:2] for p in expected], rtol=1e-6)
    assert report["policy"]["per_dim"]["v_x"] == pytest.approx(np.mean([r["error"]["policy"][0, 0] for r in records]))
    with pytest.raises(ValueError, match="no file 'x.parquet'"):
        next(policy.open_episodes(vamos_root, ["x.parquet"]))


def test_pictures_are_preprocessed_alike_in_training_and_prediction(trained, vamos_root):
    """One resize, one prompt: teacher forcing and predict see the same, and so do the dataset's reader and a camera's array."""
    cfg, _, adapter = trained
    policy, data = openvla.load_policy(adapter, "cpu"), openvla.load_data(cfg)
    item = openvla.VamosDataset(data, data.validation, policy.processor.image_processor, cfg)[(0, 0)]
    core = openvla.LossModel(policy.vla, policy.processor.image_processor)
    seen = []
    real = policy.vla.embed
    policy.vla.embed = lambda ids, pixels: seen.append((ids, pixels)) or real(ids, pixels)
    core(policy.collate([item]))
    policy.predict([dict(images={"camera1": item["image"]}, instruction=item["instruction"])])
    del policy.vla.embed
    assert torch.equal(seen[0][1], seen[1][1]) and seen[0][0][0, :-3].tolist() == seen[1][0][0].tolist()


# ---- faults ----------------------------------------------------------------------------------------------------------


def test_a_non_finite_loss_never_reaches_the_weights(make, monkeypatch, capsys):
    compute = openvla.LossModel.compute_loss
    calls = []

    def poisoned(self, batch):
        out = compute(self, batch)
        calls.append(1)
        if len(calls) == 2:
            out["sample_loss"][1] = float("nan")
            out["loss"] = out["loss"] * float("nan")
        return out

    monkeypatch.setattr(openvla.LossModel, "compute_loss", poisoned)
    state, rows = train(make(max_steps=2, val_steps=9, data_root_dir=make().data_root_dir))
    said = capsys.readouterr().out
    assert (
        "NON-FINITE step 2 skipped" in said
        and "row group" in said
        and [r for r in rows if "nonfinite" in r][0]["nonfinite"][0][1].startswith("row group")
    )
    assert all(torch.isfinite(v).all() for v in state.values()) and {
        float(v) for k, v in state.items() if k.endswith("/step")
    } == {1.0}
    calls.clear()
    monkeypatch.setattr(
        openvla.LossModel,
        "compute_loss",
        lambda self, batch: (
            (out := compute(self, batch))
            | dict(loss=out["loss"] * float("nan"), sample_loss=out["sample_loss"] * float("nan"))
        ),
    )
    with pytest.raises(FloatingPointError, match="10 steps in a row"):
        openvla.main(make(max_steps=30, run_id_note="all"))


def test_a_full_disk_costs_the_new_checkpoint_only(make, monkeypatch, capsys):
    cfg = make(save_steps=2, max_steps=4)
    real, calls = openvla.ckpt.require_space, []

    def full(folder, needed):
        calls.append(folder)
        if len(calls) == 2:
            raise openvla.ckpt.DiskFull(28, "no room")
        real(folder, needed)

    monkeypatch.setattr(openvla.ckpt, "require_space", full)
    with pytest.raises(openvla.ckpt.DiskFull, match="steps_2"):
        openvla.main(cfg)
    assert (
        list(openvla.ckpt.steps_in(folders(cfg)[1])) == [2]
        and "CHECKPOINT NOT SAVED at step 4" in capsys.readouterr().out
    )
    calls.clear()
    monkeypatch.setattr(openvla.ckpt, "require_space", lambda folder, needed: full(folder, needed))
    with pytest.raises(
        openvla.ckpt.DiskFull, match="the training is saved in .*steps_4, but not merged.*--resume auto"
    ):
        openvla.main(dataclasses.replace(cfg, resume_from_checkpoint="auto"))  # the second call is that of the merge
    run, adapter = folders(cfg)
    assert list(openvla.ckpt.steps_in(adapter)) == [2, 4] and not (run / "config.json").exists()
    openvla.main(dataclasses.replace(cfg, resume_from_checkpoint="auto"))  # only merges
    close(openvla.load_policy(run, "cpu").vla.state_dict(), openvla.load_policy(adapter, "cpu").vla.state_dict())


def test_an_interrupted_merge_leaves_no_model_that_loads(trained, monkeypatch, tmp_path):
    import shutil

    _, run, adapter = trained
    shutil.copytree(run, tmp_path / "run")
    real, moved = os.replace, []

    def die(source, target):
        if Path(source).parent.name == "merging":
            moved.append(source)
            if len(moved) == 4:
                raise KeyboardInterrupt
        return real(source, target)

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        openvla.merge_adapter(adapter / "steps_2", tmp_path / "run")
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="no complete model"):
        openvla.load_policy(tmp_path / "run", "cpu")
    openvla.merge_adapter(adapter / "steps_2", tmp_path / "run")  # and again, to the end
    close(
        openvla.load_policy(tmp_path / "run", "cpu").vla.state_dict(),
        openvla.load_policy(adapter / "steps_2", "cpu").vla.state_dict(),
    )


def test_a_run_without_validation_files(make, vamos_root, tmp_path):
    for file in (vamos_root / "data").glob("train-*"):  # and with the files directly in the root
        (tmp_path / file.name).write_bytes(file.read_bytes())
    cfg = make(data_root_dir=tmp_path, max_steps=2, val_steps=1)
    state, rows = train(cfg)
    assert len(rows) == 2 and not any("val_loss" in r for r in rows)
    assert json.loads((folders(cfg)[0] / "meta.json").read_text())["validation"] == []


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(data_root_dir=""), "data_root_dir is not set"),
        (dict(dataset_name="bridge"), "dataset_name is 'bridge'.*vamos"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(trajectory_hz=0), "trajectory_hz is 0"),
        (dict(lora_dropout=1.0), "lora_dropout"),
        (dict(resume="auto", load_model_weights="x"), "give one of them"),
        (dict(vla_path="nobody/nothing"), "neither a directory nor reachable.*--vla_path DIR"),
    ],
)
def test_wrong_settings_are_named_before_weights_load(make, flags, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        openvla.main(make(**flags))


def test_4_bit_without_bitsandbytes_says_what_to_install(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        openvla.main(make(use_quantization=True))


def test_exp_id_is_upstreams():
    cfg = openvla.Config(vla_path="/models/openvla-7b/", batch_size=8, grad_accumulation_steps=2)
    assert openvla.exp_id(cfg) == "openvla-7b+vamos+b16+lr-0.0005+lora-r32+dropout-0.0"
    assert openvla.exp_id(dataclasses.replace(cfg, use_quantization=True, run_id_note="x", image_aug=True)).endswith(
        "+q-4bit--x--image_aug"
    )


@pytest.mark.parametrize(
    "flags, expected",
    [
        (dict(), [1, 1, 1, 1, 1]),
        (dict(warmup_steps=2), [0.5, 1, 1, 1, 1]),
        (dict(lr_schedule="cosine"), [1, 0.8536, 0.5, 0.1464, 0]),
    ],
)
def test_learning_rate_by_hand(flags, expected):
    cfg = openvla.Config(learning_rate=1.0, max_steps=4, **flags)
    assert [openvla.lr_at(s, cfg) for s in range(5)] == pytest.approx(expected, abs=1e-4) and openvla.lr_at(
        1000, cfg
    ) == pytest.approx(expected[-1])


def test_check_needs_no_weights(make, capsys, tmp_path):
    openvla.main(make(check=True, check_images=True))
    said = capsys.readouterr().out
    assert (
        "check passed" in said
        and "every picture decodes" in said
        and "left out  1 rows with fewer than 2 points" in said
        and "1 rows without one use the other column" in said
    )
    assert "targets   " in said and "[31" in said
    openvla.main(make(check=True, vla_path="nobody/nothing"))
    assert "prompt and action tokens are not shown" in capsys.readouterr().out


def test_check_on_recordings_in_the_public_layout(shared, make, capsys):
    root = shared / "data/vamos"
    openvla.main(make(check=True, data_root_dir=root, samples="all"))
    assert "41 of 41 rows usable, 2243 samples" in capsys.readouterr().out
    rows = [
        len(p) - 1
        for f in sorted((root / "data").glob("train-*"))
        for p in pq.read_table(f)["trajectory_3d"].to_pylist()
    ]
    assert sum(rows) == 2243
    state, metrics = train(make(data_root_dir=root, max_steps=2, val_samples=4, batch_size=2))
    assert [r["step"] for r in metrics if "train_loss" in r] == [1, 2] and [r for r in metrics if "val_mae_vx" in r]
