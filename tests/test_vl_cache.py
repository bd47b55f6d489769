"""The feature cache: the encoder against transformers' own code; files that are whole, and refused when anything that
shapes them differs; builds that are killed, shared out or repeated."""

import functools
import contextlib
import multiprocessing
import os
import pickle
import re
import shlex
import shutil
import signal
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import build_vl_cache
import create_datapkl
import make_demo
from common import MissingFile, UserError, hub
from common import checkpoint as ckpt
from common import sessions as ss
from common import vl_cache as vc
from common.config import parse_config

ROOT = Path(__file__).resolve().parent.parent
VIEWS = ["View1", "View5"]
SMALL = ["--image-resize-height", "56", "--image-resize-width", "84", "--num-workers", "1"]


def preprocess(root, **more):
    create_datapkl.main(create_datapkl.Config(dataset_dirs=[str(root)], workers=0, **more))


@pytest.fixture(scope="module")
def encoder(qwen_dir):
    return vc.VLEncoder(qwen_dir, VIEWS, 56, 84)


@pytest.fixture(scope="module")
def built(qwen_dir, tmp_path_factory):
    """4 sessions of 1.5 s in three data sets, preprocessed, with their cache/."""
    kinds = dict(white=2, needle=1, new=0, oct=1, seconds=1.5, size=(36, 64))
    root = make_demo.write_sessions(tmp_path_factory.mktemp("sessions"), 0, **kinds)
    preprocess(root)
    build(root, qwen_dir)
    return root


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    """Of the same shape, with other weights."""
    return make_demo.write_qwen2_5_vl(tmp_path_factory.mktemp("other"), seed=9, text=(64, 2), vision=(32, 2))


@pytest.fixture
def cached(built, tmp_path):
    return Path(shutil.copytree(built, tmp_path / "sessions"))


@pytest.fixture
def root(cached):
    """Without features."""
    shutil.rmtree(cached / "cache")
    return cached


def build(root, model, *more):
    words = ["--dataset-dirs", str(root), "--model", str(model), *SMALL, *more]
    build_vl_cache.main(parse_config(build_vl_cache.Config, words, build_vl_cache.ALIASES))


def read(root, model, reuse=3, pictures=True, **more):
    expected = dict(model=str(model), views=None, height=56, width=84) | more
    return vc.read_features(root / "cache", ss.find_sessions([root]), expected, reuse, pictures=pictures)


def feature_files(root):
    return sorted((root / "cache/qwen_vl_features").glob("[!.]*.pt"))


def times(root):
    return {path.name: path.stat().st_mtime_ns for path in feature_files(root)}


def same_features(a, b):
    one, two = ({path.name: vc.FeatureFile(path) for path in feature_files(root)} for root in (a, b))
    same = [one[name].rows == two[name].rows and torch.equal(one[name].features, two[name].features) for name in one]
    return one.keys() == two.keys() and all(same)


def images(seed, size=(36, 64)):
    rng = np.random.default_rng(seed)
    return {view: rng.integers(0, 256, (*size, 3), dtype=np.uint8) for view in VIEWS}


def touch(path):
    about = path.stat()
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns + 10**9))


# ---- the encoder -----------------------------------------------------------------------------------------------------
def test_features_equal_transformers_own_processing(qwen_dir, encoder):
    """Image processor, token expansion, rope positions and forward of transformers on the squashed image, mean over all
    tokens: the same feature; below the last layer the same state."""
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    shown, pixels = images(0), dict(shortest_edge=56 * 84, longest_edge=56 * 84)
    mean, std = encoder.recipe["mean_and_std"]
    processor = Qwen2VLImageProcessorPil(size=pixels, image_mean=mean, image_std=std)
    squashed = [Image.fromarray(shown[view]).resize((84, 56), Image.BICUBIC) for view in VIEWS]
    inputs = processor(squashed, return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 6]] * 2
    tokenizer = AutoTokenizer.from_pretrained(qwen_dir)
    content = [dict(type="image"), dict(type="image"), dict(type="text", text="go on")]
    text = tokenizer.apply_chat_template([dict(role="user", content=content)], tokenize=False)
    text = text.replace("<|image_pad|>", "<|image_pad|>" * 6)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(qwen_dir).eval()
    inputs |= dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    inputs |= dict(mm_token_type_ids=(ids == model.config.image_token_id).int(), output_hidden_states=True)
    with torch.no_grad():
        out = model.model(**inputs)
    feature = encoder.encode([(shown, "go on")])
    mean = out.last_hidden_state[0].mean(0)
    assert feature.shape == (1, 1, 64) and torch.allclose(feature[0, 0], mean.half().float(), atol=2e-3)
    for layer in (0, 1):  # transformers gives the last one normed
        got = vc.VLEncoder(qwen_dir, VIEWS, 56, 84, layer=layer, dtype="fp32").encode([(shown, "go on")])
        assert torch.allclose(got[0, 0], out.hidden_states[layer][0].mean(0), atol=1e-4), layer


def test_a_feature_is_of_its_pictures_and_words_alone(qwen_dir, encoder, tmp_path):
    """Not of its company: rows of other lengths pad each other, an unmasked mean over padding would be off by 0.8. Not
    of the order in which views come in. A path is its pixels."""
    shown, paths = images(0), {view: tmp_path / f"{view}.png" for view in VIEWS}
    rows = [(shown, "go"), (images(1), "a much longer instruction than that of the others"), (images(2), "go")]
    together, alone = encoder.encode(rows), torch.cat([encoder.encode([row]) for row in rows])
    assert torch.allclose(together, alone, atol=2e-3)
    for other in ((shown, "stop"), (images(3), "go"), (dict(zip(VIEWS, reversed(shown.values()), strict=True)), "go")):
        assert (encoder.encode([other])[0] - alone[0]).abs().max() > 1e-3
    for view, path in paths.items():
        Image.fromarray(shown[view]).save(path)
    other = vc.VLEncoder(qwen_dir, VIEWS[::-1], 56, 84)
    for same in (dict(reversed(shown.items())), paths):
        assert torch.equal(other.encode([(same, "go")])[0], alone[0])
    assert other.recipe == encoder.recipe and vc.VLEncoder(qwen_dir, VIEWS).grid == (12, 22)  # the guide's 264
    paths["View1"].write_bytes(b"no image")
    with pytest.raises(UserError, match="View1.png cannot be read as an image"):
        encoder.encode([(paths, "go")])


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(layer=3), "layer is 3"),
        (dict(cut=999), "model.safetensors cannot be read .*copy or download it again"),
        (dict(template="{% for"), "one that is damaged .*TemplateSyntaxError.* Copy or download it again"),
        (dict(add=np.nan), "layers.1.mlp.gate_proj.weight has values that are not finite. Copy or download"),
        ({}, "lacks 1 tensors: .*layers.1.mlp"),  # transformers would put random numbers in its place
    ],
)
def test_a_model_that_lacks_a_tensor_and_wrong_settings_are_refused(qwen_dir, tmp_path, wrong, message):
    folder = Path(shutil.copytree(qwen_dir, tmp_path / "m"))
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "layers.1.mlp.up_proj" in name)
    tensors[name.replace("up_proj", "gate_proj")] += wrong.pop("add", 0)
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", dict(format="pt"))
    os.truncate(folder / "model.safetensors", wrong.pop("cut", (folder / "model.safetensors").stat().st_size))
    template = folder / "chat_template.jinja"
    template.write_text(wrong.pop("template", template.read_text()))
    with pytest.raises(UserError, match=message):
        assert vc.VLEncoder(**dict(model=folder, views=VIEWS, height=56, width=84) | wrong).vlm


# ---- fingerprint -----------------------------------------------------------------------------------------------------
@pytest.fixture
def big(qwen_dir, tmp_path):
    """A model folder whose weights are random bytes, 8 MB."""
    folder = Path(shutil.copytree(qwen_dir, tmp_path / "big"))
    (folder / "model.safetensors").write_bytes(np.random.default_rng(0).bytes(1 << 23))
    return folder


def test_every_byte_of_the_weights_counts_and_is_read_once(big, monkeypatch):
    reads, whole = [], hub.sha256_of
    monkeypatch.setattr(hub, "sha256_of", lambda path: reads.append(path.name) or whole(path))
    first, shard = vc.model_digest(big), big / "model.safetensors"
    assert vc.model_digest(big) == first and reads == ["model.safetensors"]
    touch(shard)
    assert vc.model_digest(big) == first and len(reads) == 2, "the same bytes at another time"
    shard.write_bytes(shard.read_bytes().replace(b"\0\0", b"\0\1", 1))
    assert vc.model_digest(big) != first and len(reads) == 3 and vc.model_digest("no/such-model") is None
    # weights that a repository has in two forms are downloaded in one
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda _, **k: reads.append(k["allow_patterns"]) or big)
    assert hub.local_folder("lab/model") == big and "pytorch_model*.bin" not in reads[-1]
    shard.rename(big / "pytorch_model.bin")
    assert hub.local_folder("lab/model") == big and "pytorch_model*.bin" in reads[-1]


def test_only_files_that_shape_a_feature_count(big):
    digests = {vc.model_digest(big)}
    for name in ("video_preprocessor_config.json", "generation_config.json", "README.md"):
        (big / name).write_text("{}\n\n")
        assert {vc.model_digest(big)} == digests
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (big / name).write_text((big / name).read_text() + " ")
        digests.add(vc.model_digest(big))
    assert len(digests) == 5


# ---- build and read --------------------------------------------------------------------------------------------------
def test_what_is_read_is_what_the_encoder_says(cached, qwen_dir, encoder, monkeypatch):
    """Every look of every session, in a root that was moved since; every file is read once, not by each worker."""
    files, recipe = read(cached, qwen_dir)
    with monkeypatch.context() as patch:
        patch.delattr(vc.ckpt, "load_state")
        assert all(len(file[look]) for file in files.values() for look in file.keys)
    assert recipe == encoder.recipe and len(files) == 4
    for session in ss.find_sessions([cached]):
        looks, file = session.ticks(3, VIEWS).unique(), files[session.name]
        assert file.shape == (len(looks), 1, 64) and file.features.dtype == torch.float16 and looks
        paths = [dict(zip(VIEWS, [session.path / name for name in look], strict=True)) for look in looks]
        want = encoder.encode([(images, session.instruction) for images in paths])
        assert torch.allclose(torch.stack([file[look] for look in looks]).float(), want, atol=2e-3)
        packed = pickle.dumps(file)
        assert len(packed) < 20000 and torch.equal(pickle.loads(packed)[looks[2]], file[looks[2]])
        keys, order = file.meta["keys"], range(len(looks))[::-1]  # built again meanwhile
        meta = file.meta | dict(keys=[keys[i] for i in order])
        build_vl_cache.write_features(file.path, file.features[list(order)], meta)
        assert torch.equal(pickle.loads(packed)[looks[0]], file[looks[0]])


def half_zeroed(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


def one_bit(path):
    numbers, data = ckpt.load_state(path)["features"].numpy().tobytes(), bytearray(path.read_bytes())
    data[data.index(numbers) + 7] ^= 1
    path.write_bytes(data)


def test_only_what_is_missing_or_damaged_is_built(cached, built, qwen_dir, capsys):
    before = times(cached)
    build(cached, qwen_dir)
    assert times(cached) == before and "0 built here" in capsys.readouterr().out
    older = dict(features=torch.zeros(1), meta=dict(recipe=dict(format_version=2), keys=[]))
    older = functools.partial(build_vl_cache.write_features, **older)
    for damage in (Path.unlink, lambda path: path.write_bytes(b""), half_zeroed, one_bit, older):
        damage(feature_files(cached)[2])
        why = r"no features that fit of 1 of 4[\s\S]*(none at all|is damaged)[\s\S]*python build_vl_cache\.py"
        with pytest.raises((MissingFile, vc.CacheMismatch), match=why):
            read(cached, qwen_dir)
        build(cached, qwen_dir)
        assert "1 built here" in capsys.readouterr().out and same_features(cached, built)


def other_pixels(root):
    """In a file of the same size."""
    path = sorted((root / "White_silicone_white_circle").rglob("View5/*.jpg"))[2]
    black = make_demo.jpeg(np.zeros((36, 64, 3), np.uint8))
    path.write_bytes(black + bytes(path.stat().st_size - len(black)))


def another_instruction(root):
    preprocess(root, instruction=dict(White_silicone_white_circle="other words"))


def a_new_image(root):
    """Between two that were used: ticks now show other images."""
    path = sorted((root / "OCT_insertion").rglob("view1/left/*.jpg"))[1]
    stem, stamp = path.stem.rsplit("_", 1)
    black = make_demo.jpeg(np.zeros((36, 64, 3), np.uint8))
    path.with_name(f"{stem}_{float(stamp) + 0.02:.3f}.jpg").write_bytes(black)
    preprocess(root)


@pytest.mark.parametrize("change, looks", [(other_pixels, 1), (another_instruction, 4), (a_new_image, 1)])
def test_changed_sessions_are_refused_and_only_what_changed_is_computed(cached, qwen_dir, monkeypatch, change, looks):
    change(cached)
    with pytest.raises(vc.CacheMismatch, match=f"no feature of {looks} of 4 looks, e.g. at .*: another image, instru"):
        read(cached, qwen_dir)
    calls, whole = [], vc.VLEncoder.encode
    monkeypatch.setattr(vc.VLEncoder, "encode", lambda self, rows: calls.append(len(rows)) or whole(self, rows))
    build(cached, qwen_dir)
    assert len(read(cached, qwen_dir)[0]) == 4 and sum(calls) == (looks if looks == 1 else 2 * looks)


def test_pictures_are_known_by_content_where_their_times_moved(cached, qwen_dir, monkeypatch, capsys):
    """A copy that loses times: nothing is built again, and once the builder has seen it each image is looked at once
    and not read. No VLM is loaded. Where cache and data.pkl are all there is, it can do without images."""
    for path in cached.rglob("*.jpg"):
        touch(path)
    assert len(read(cached, qwen_dir)[0]) == 4
    build(cached, qwen_dir)
    assert "0 built here" in capsys.readouterr().out
    stats, stat = [], os.stat
    monkeypatch.setattr(os, "stat", lambda path, *a, **k: stats.append(str(path)) or stat(path, *a, **k))
    for owner, name in ((hub, "sha256_of"), (Image, "open"), (vc, "VLEncoder")):
        monkeypatch.setattr(owner, name, lambda *_, name=name: pytest.fail(f"{name} was called"))
    assert len(read(cached, qwen_dir)[0]) == 4
    seen = [path for path in stats if path.endswith(".jpg")]
    assert seen and len(seen) == len(set(seen))
    for path in cached.rglob("*.jpg"):
        path.unlink()
    with pytest.raises(vc.CacheMismatch, match="is in data.pkl but not on the disk"):
        read(cached, qwen_dir)
    assert len(read(cached, qwen_dir, pictures=False)[0]) == 4


def test_only_the_first_process_compares_pictures(cached, qwen_dir):
    """The others take its word, and refuse where what they see is not the same."""
    import train_async

    for path in cached.rglob("*.jpg"):
        path.unlink()
    size = dict(image_resize_height=56, image_resize_width=84)
    cfg = train_async.Config(dataset_dir=[str(cached)], model=str(qwen_dir), val_split=0.3, **size)
    run = SimpleNamespace(main=False, once=lambda function, *a: function(*a))
    assert len(train_async.load_data(cfg, run).features.files) == 4
    run.once = lambda function, *a: "another" if function is str else function(*a)
    with pytest.raises(UserError, match="the processes see other sessions or features"):
        train_async.load_data(cfg, run)
    run.main = True
    with pytest.raises(UserError, match="--no-check-pictures"):
        train_async.load_data(cfg, run)


REFUSED = [
    (dict(height=112), "height was 56, now 112"),
    (dict(views=["View1"]), r"views was \['View1', 'View5'\], now \['View1'\]"),
    (dict(layer=1), "layer was -1, now 1"),
    (dict(dtype="fp32"), "dtype was 'fp16', now 'fp32'"),
    (dict(reuse=2), r"no feature of \d of 5 looks, e.g. at .*: another image, instruction or rate"),
    (dict(model="Qwen/Qwen2.5-VL-7B-Instruct"), "model was"),  # not on this machine: its name is all there is
]


@pytest.mark.parametrize("changed, message", REFUSED)
def test_other_settings_are_refused(built, qwen_dir, changed, message):
    with pytest.raises(vc.CacheMismatch, match=message):
        read(built, **dict(model=qwen_dir) | changed)


def test_another_model_is_refused_and_the_same_one_elsewhere_is_not(built, qwen_dir, other_model, tmp_path):
    with pytest.raises(vc.CacheMismatch, match="weights was '.*', now '.*'"):
        read(built, other_model)
    with pytest.raises(vc.CacheMismatch, match="weights was"):
        vc.VLEncoder.from_recipe(read(built, qwen_dir)[1], model=other_model)
    for model in (qwen_dir, shutil.copytree(qwen_dir, tmp_path / "moved"), f"x/{qwen_dir.name}"):
        assert len(read(built, model, reuse=6)[0]) == 4


def test_two_kinds_that_fit_are_not_guessed_between_and_prune_keeps_one(cached, qwen_dir, capsys):
    build(cached, qwen_dir, "--layer", "1")
    with pytest.raises(vc.CacheMismatch, match="has 2 kinds of features .*'layer': 1"):
        read(cached, qwen_dir)
    assert read(cached, qwen_dir, layer=1)[1]["layer"] == 1
    for path in feature_files(cached)[0:4:3]:  # each kind lacks another session
        path.unlink()
    with pytest.raises(vc.CacheMismatch, match="fit of 1 of 4 sessions:\n.*of other settings than those of the others"):
        read(cached, qwen_dir)
    folder = cached / "cache/qwen_vl_features"
    left = folder / f"{ckpt.TEMPORARY}999999999@{socket.gethostname()}~x.pt"  # by a kill
    stranger = folder / f"Other__-__recv_all_9__{'a' * 24}.pt"
    for path in (left, stranger):
        path.write_bytes(b"")
    build(cached, qwen_dir, "--vlm-reuse-count", "1", "--prune")  # finer looks of the first kind
    assert "pruned    3 files" in capsys.readouterr().out and stranger.exists() and not left.exists()
    assert all(len(read(cached, qwen_dir, reuse=reuse)[0]) == 4 for reuse in (1, 2, 3))


def test_the_printed_training_command_finds_the_features(root, qwen_dir, capsys):
    """As it stands, with views in another order, of two folders, and a cache elsewhere."""
    import train_async

    parts = [str(root / name) for name in ("White_silicone_white_circle", "OCT_insertion")]
    words = ["--cache-root", str(root / "my cache"), "--views", "View5", "View1", "--vlm-reuse-count", "2"]
    build(parts[0], qwen_dir, "--dataset-dirs", *parts, *words)
    hint = shlex.split(next(line for line in capsys.readouterr().out.splitlines() if line.startswith("train: "))[7:])
    assert hint[:2] == ["python", "train_async.py"]
    cfg = parse_config(train_async.Config, hint[2:], train_async.ALIASES)
    expected = dict(model=cfg.model, views=cfg.views, height=cfg.image_resize_height, width=cfg.image_resize_width)
    sessions, rest = ss.find_sessions(parts), (expected, cfg.vlm_reuse_count, cfg.max_image_age)
    files, recipe = vc.read_features(cfg.cache_root, ss.find_sessions(cfg.dataset_dir), *rest)
    assert set(files) == {session.name for session in sessions} and recipe["views"] == VIEWS
    expected["views"] = ["View5", "View1"]
    assert vc.read_features(cfg.cache_root, sessions, *rest)[1] == recipe
    with pytest.raises(MissingFile) as error:  # and the command that an error names
        vc.read_features(root / "none", sessions, *rest, roots=parts)
    advice = shlex.split(re.search(r"python (build_vl_cache.py .*)", str(error.value))[1])[1:]
    build_vl_cache.main(parse_config(build_vl_cache.Config, advice, build_vl_cache.ALIASES))
    assert len(vc.read_features(root / "none", sessions, *rest)[0]) == 3


def test_a_view_not_all_sessions_have_is_left_out_and_said(root, qwen_dir, capsys):
    session = ss.find_sessions([root])[0]
    path = session.path / session.view("View5")[0][3]
    Image.open(path).resize((32, 32)).save(path)
    with pytest.raises(UserError, match=rf"{path.name} cannot be read .* it is \(32, 32\), the first one \(36, 64\)"):
        build(root, qwen_dir)
    shutil.rmtree(session.path / "View5")
    preprocess(root)
    build(root, qwen_dir)
    assert "left out, for not every session has it: View5." in capsys.readouterr().out
    assert read(root, qwen_dir)[1]["views"] == ["View1"]
    with pytest.raises((UserError, ss.BadSession), match="has no view 'View5'"):
        build(root, qwen_dir, "--views", "View1", "View5")


def test_out_of_memory_halves_the_micro_batch(built, tmp_path, encoder, monkeypatch):
    """At most 2 rows fit: 8 becomes 2, the features are the same; at one row it is an error that says what to do."""
    session = ss.find_sessions([built])[0]
    looks, most, whole = session.ticks(1, VIEWS).unique(), [2], encoder.encode
    alone = build_vl_cache.Builder(encoder, tmp_path).features(session, looks)

    def small(rows):
        if len(rows) > most[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(rows)

    monkeypatch.setattr(encoder, "encode", small)
    builder = build_vl_cache.Builder(encoder, tmp_path, 8, 2)
    assert torch.allclose(builder.features(session, looks), alone, atol=2e-3)
    assert builder.micro_batch == 2 and builder.computed == len(looks)
    most[0] = 0
    with pytest.raises(UserError, match=f"memory at {session.name} with one feature at a time: lower --image-resize"):
        builder.features(session, looks)


def test_a_feature_that_is_not_finite_is_not_written(root, qwen_dir, monkeypatch):
    whole = vc.VLEncoder.encode
    monkeypatch.setattr(vc.VLEncoder, "encode", lambda self, rows: whole(self, rows) * 1e9)
    with pytest.raises(UserError, match=r"\S+/-/\S+: a feature is not finite in torch.float16"):
        build(root, qwen_dir)
    assert not feature_files(root)


def test_check_needs_no_model_and_the_shipped_config_parses(root, capsys, monkeypatch):
    with pytest.raises(UserError, match="image_resize_height is 27: expected 28 or more"):
        build(root, "no/model", "--image_resize_height", "27", "--check")
    build(root, "no/model", "--config", str(ROOT / "configs/vl_cache.yaml"), "--check")
    out = capsys.readouterr().out
    assert "64x36 is seen as 84x56: 6 tokens, 12 per feature" in out and "check passed" in out
    assert not (root / "cache").exists()
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match=f"{root} cannot be written: --cache-root FOLDER"):
        build(root, "no/model")


# ---- several processes, killed ones ----------------------------------------------------------------------------------
def test_a_stop_signal_keeps_what_is_finished(root, qwen_dir, capsys, monkeypatch):
    whole, calls = build_vl_cache.Builder.features, []

    def told_to_stop(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, *arguments)

    monkeypatch.setattr(build_vl_cache.Builder, "features", told_to_stop)
    with pytest.raises(SystemExit) as end:
        build(root, qwen_dir)
    assert end.value.code == 1 and len(feature_files(root)) == 2
    assert "stopped by SIGTERM; finished sessions stay" in capsys.readouterr().out


def test_ranks_need_no_other_rank(root, built, qwen_dir, encoder, monkeypatch, capsys):
    """Rank 1 of 2 without a rank 0: no collective could come back. It leaves out a session that another process holds;
    rank 0 waits for that one and takes it over when its lock is freed by a death."""
    session, folder = ss.find_sessions([root])[0], root / "cache/qwen_vl_features"
    folder.mkdir(parents=True)
    held, release = threading.Event(), threading.Event()

    def other_process():
        path = vc.file_of(root / "cache", session, encoder.recipe)
        with contextlib.suppress(RuntimeError), build_vl_cache.claimed(path):
            held.set()
            release.wait(60)
            raise RuntimeError("it dies at work")

    thread = threading.Thread(target=other_process)
    thread.start()
    held.wait(60)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    build(root, qwen_dir)
    assert len(feature_files(root)) == 3 and capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(time, "sleep", lambda seconds: release.set() or thread.join(seconds))
    build(root, qwen_dir)
    assert release.is_set() and "1 built here" in capsys.readouterr().out and same_features(root, built)


def test_a_killed_build_goes_on(root, built, qwen_dir, capsys):
    """kill -9 in the middle: what has a final name is whole, nothing else counts, the lock is free. The next one does
    the rest, bit for bit what one process makes."""
    process = multiprocessing.get_context("fork").Process(target=build, args=(root, qwen_dir))
    process.start()
    while not feature_files(root) and process.is_alive():
        time.sleep(0.002)
    process.kill()
    process.join()
    first = times(root)
    assert first and all(vc.FeatureFile(path).meta for path in feature_files(root))
    build(root, qwen_dir)
    assert f"{4 - len(first)} built here" in capsys.readouterr().out and first.items() <= times(root).items()
    assert same_features(root, built) and not list((root / "cache/qwen_vl_features").glob(".lock-*"))
