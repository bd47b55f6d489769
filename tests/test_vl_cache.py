"""The feature cache: the encoder against transformers' own code, files that are whole and refused when anything differs, builds that are killed, shared out or repeated."""

import copy
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import build_vl_cache
import create_datapkl
import make_demo
from common import checkpoint as ckpt
from common import sessions as ss
from common import vl_cache as vc
from common.config import parse_config

ROOT = Path(__file__).resolve().parent.parent
VIEWS = ["View1", "View5"]
SMALL = ["--image-resize-height", "56", "--image-resize-width", "84", "--num-workers", "1"]


@pytest.fixture(scope="session")
def recordings(tmp_path_factory):
    """4 preprocessed sessions of 1.5 s in three data sets."""
    root = make_demo.write_sessions(
        tmp_path_factory.mktemp("sessions"), 0, white=2, needle=1, new=0, oct=1, seconds=1.5, size=(36, 64)
    )
    create_datapkl.main(parse_config(create_datapkl.Config, ["--dataset_dirs", str(root), "--workers", "0"]))
    return root


@pytest.fixture
def root(recordings, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(recordings, tmp_path / "sessions"))


@pytest.fixture(scope="session")
def encoder(qwen_dir):
    return vc.VLEncoder(qwen_dir, VIEWS, 56, 84)


def config(root, qwen_dir, *more):
    return parse_config(build_vl_cache.Config, ["--dataset-dirs", str(root), "--model", str(qwen_dir), *SMALL, *more])


def expected(qwen_dir, **more):
    return dict(model=str(qwen_dir), views=None, height=56, width=84) | more


def read(root, qwen_dir, reuse=3, **more):
    return vc.read_features(root / "cache", ss.find_sessions([root]), expected(qwen_dir, **more), reuse)


def images(seed, n=2, size=(36, 64)):
    rng = np.random.default_rng(seed)
    return {v: rng.integers(0, 256, (*size, 3), dtype=np.uint8) for v in VIEWS[:n]}


# ---- the encoder -----------------------------------------------------------------------------------------------------


def test_features_equal_transformers_own_processing(qwen_dir, encoder):
    """Image processor, token expansion, rope positions and forward of transformers on the squashed image, mean over all tokens: the same feature."""
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    shown = images(0)
    about = json.loads((qwen_dir / "preprocessor_config.json").read_text())
    processor = Qwen2VLImageProcessorPil(
        size=dict(shortest_edge=56 * 84, longest_edge=56 * 84),
        image_mean=about["image_mean"],
        image_std=about["image_std"],
    )
    squashed = [Image.fromarray(shown[v]).resize((84, 56), Image.BICUBIC) for v in VIEWS]
    pixels = processor(squashed, return_tensors="pt")
    assert pixels["image_grid_thw"].tolist() == [[1, 4, 6]] * 2
    tokenizer = AutoTokenizer.from_pretrained(qwen_dir)
    text = tokenizer.apply_chat_template(
        [dict(role="user", content=[dict(type="image"), dict(type="image"), dict(type="text", text="go on")])],
        tokenize=False,
        add_generation_prompt=False,
    )
    ids = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * 6), return_tensors="pt", add_special_tokens=False)[
        "input_ids"
    ]
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(qwen_dir).eval()
    with torch.no_grad():
        hidden = model.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels["pixel_values"],
            image_grid_thw=pixels["image_grid_thw"],
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
        ).last_hidden_state
    feature = encoder.encode([(shown, "go on")])
    assert feature.shape == (1, 1, 64) and torch.allclose(feature[0, 0], hidden[0].mean(0).half().float(), atol=2e-3)
    for layer in (0, 1, 2):
        with torch.no_grad():
            states = model.model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=pixels["pixel_values"],
                image_grid_thw=pixels["image_grid_thw"],
                mm_token_type_ids=(ids == model.config.image_token_id).int(),
                output_hidden_states=True,
            ).hidden_states
        if layer < 2:  # transformers gives the last one normed
            got = vc.VLEncoder(qwen_dir, VIEWS, 56, 84, layer=layer, dtype="fp32").encode([(shown, "go on")])
            assert torch.allclose(got[0, 0], states[layer][0].mean(0), atol=1e-4), layer


def test_company_in_the_batch_changes_nothing(encoder):
    """Rows of other lengths pad each other; an unmasked mean over padding would be off by 0.8. Another instruction or image does change it."""
    rows = [(images(0), "go"), (images(1), "a much longer instruction than that of the others"), (images(2), "go")]
    together, alone = encoder.encode(rows), torch.cat([encoder.encode([r]) for r in rows])
    assert torch.allclose(together, alone, atol=2e-3)
    assert (encoder.encode([(images(0), "stop")])[0] - alone[0]).abs().max() > 0.01 and (
        encoder.encode([(images(3), "go")])[0] - alone[0]
    ).abs().max() > 0.01


def test_views_have_their_own_order(encoder):
    shown = images(0)
    swapped = dict(View1=shown["View5"], View5=shown["View1"])
    reordered = dict(reversed(shown.items()))
    assert (encoder.encode([(swapped, "go")]) - encoder.encode([(shown, "go")])).abs().max() > 1e-3
    assert torch.equal(encoder.encode([(reordered, "go")]), encoder.encode([(shown, "go")]))


def test_several_tokens_are_means_of_stretches(qwen_dir, encoder):
    many = vc.VLEncoder(qwen_dir, VIEWS, 56, 84, tokens=4)
    feature = many.encode([(images(0), "go")])
    assert feature.shape == (1, 4, 64)
    hidden = torch.arange(10.0)[:, None]
    assert vc.pool(hidden, 4).ravel().tolist() == [1.0, 4.0, 6.5, 8.5] and vc.pool(hidden, 1).item() == 4.5
    with pytest.raises(ValueError, match="tokens is 11, but the prompt and its images have only 10"):
        vc.pool(hidden, 11)


def test_a_path_and_its_pixels_are_the_same(encoder, tmp_path):
    shown = images(0)
    for v, x in shown.items():
        Image.fromarray(x).save(tmp_path / f"{v}.png")
    assert torch.equal(
        encoder.encode([({v: tmp_path / f"{v}.png" for v in VIEWS}, "go")]), encoder.encode([(shown, "go")])
    )
    (tmp_path / "View1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="View1.png cannot be read as an image"):
        encoder.encode([({v: tmp_path / f"{v}.png" for v in VIEWS}, "go")])


def test_the_guides_size_is_264_tokens_per_view(qwen_dir):
    assert (
        vc.VLEncoder(qwen_dir, VIEWS, 360, 640).grid == (12, 22)
        and vc.VLEncoder(qwen_dir, VIEWS, 270, 480).grid == (9, 17)
        and vc.VLEncoder(qwen_dir, VIEWS, 540, 960).grid == (19, 34)
    )


def test_from_recipe_is_the_same_encoder_and_refuses_another_model(qwen_dir, encoder, tmp_path):
    moved = shutil.copytree(qwen_dir, tmp_path / "elsewhere")
    again = vc.VLEncoder.from_recipe(encoder.recipe(), model=moved)
    assert torch.equal(again.encode([(images(0), "go")]), encoder.encode([(images(0), "go")]))
    other = make_demo.write_qwen2_5_vl(tmp_path / "other", seed=9, text=(64, 2), vision=(32, 2))
    with pytest.raises(vc.CacheMismatch, match="weights was"):
        vc.VLEncoder.from_recipe(encoder.recipe(), model=other)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(views=[]), "views is empty"),
        (dict(layer=3), "layer is 3: expected -1"),
        (dict(height=20), "at least 28 x 28"),
        (dict(pooling="max"), "pooling is max"),
    ],
)
def test_wrong_encoders(qwen_dir, wrong, message):
    with pytest.raises(ValueError, match=message):
        vc.VLEncoder(**dict(model=qwen_dir, views=VIEWS) | wrong)


# ---- fingerprint -----------------------------------------------------------------------------------------------------


def test_every_field_of_the_fingerprint_counts(recordings, encoder):
    s = ss.find_sessions([recordings])[0]
    ticks = s.ticks(3, VIEWS)
    meta = vc.make_meta(encoder.recipe(), s, ticks)
    seen = {vc.fingerprint(meta)}
    changes = [("recipe", key) for key in meta["recipe"] if key != "model"] + [
        (key,) for key in meta if key != "recipe"
    ]
    for path in changes:
        other = copy.deepcopy(meta)
        place = other[path[0]] if len(path) == 2 else other
        place[path[-1]] = "something else"
        seen.add(vc.fingerprint(other))
    for view in VIEWS:
        for part in range(3):
            other = copy.deepcopy(meta)
            other["frames"][view][0][part] = "something else"
            seen.add(vc.fingerprint(other))
    assert len(seen) == 1 + len(changes) + 6 and all(len(fp) == 24 for fp in seen)
    assert vc.fingerprint(meta | dict(recipe=meta["recipe"] | dict(model="/moved/there"))) == vc.fingerprint(
        meta
    )  # its files count, not its place


def test_the_weights_fingerprint_sees_a_changed_shard(qwen_dir, tmp_path):
    copy_ = Path(shutil.copytree(qwen_dir, tmp_path / "m"))
    assert vc.weight_fingerprint(copy_) == vc.weight_fingerprint(qwen_dir)
    shard = copy_ / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)
    assert (
        vc.weight_fingerprint(copy_) != vc.weight_fingerprint(qwen_dir)
        and vc.weight_fingerprint("no/such-model") is None
    )


# ---- build and read --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def built(recordings, qwen_dir, tmp_path_factory):
    """The sessions with their cache/, to copy."""
    root = Path(shutil.copytree(recordings, tmp_path_factory.mktemp("built") / "sessions"))
    assert build_vl_cache.main(config(root, qwen_dir)) == 0
    return root


@pytest.fixture
def cached(built, tmp_path):
    return Path(shutil.copytree(built, tmp_path / "sessions"))


def test_what_is_read_is_what_the_encoder_says(cached, qwen_dir, encoder):
    """Every tick of every session, in a root that was moved since; ticks without all images are NaN, so that nothing can use them unnoticed."""
    files, recipe = read(cached, qwen_dir)
    assert recipe == encoder.recipe() and len(files) == 4
    for s in ss.find_sessions([cached]):
        ticks, f = s.ticks(3, VIEWS), files[s.name]
        assert (
            f.shape == (5, 1, 64)
            and f.features.dtype == torch.float16
            and np.array_equal(f.tick_timestamps, ticks.tick_time)
        )
        for t in range(len(ticks)):
            if ticks.complete[t]:
                want = encoder.encode([({v: s.frame_path(v, ticks.frame_index[v][t]) for v in VIEWS}, s.instruction)])[
                    0
                ]
                assert torch.allclose(f.features[t].float(), want, atol=2e-3)
            else:
                assert f.features[t].isnan().all()
        packed = pickle.dumps(f)
        assert len(packed) < 20000 and torch.equal(pickle.loads(packed).features[2], f.features[2])


def test_reading_opens_no_image_and_loads_no_model(cached, qwen_dir, monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("an image was opened"))
    monkeypatch.setattr(vc, "VLEncoder", lambda *_: pytest.fail("the VLM was made"))
    assert len(read(cached, qwen_dir)[0]) == 4


def test_a_second_build_does_nothing_and_a_damaged_root_only_what_is_missing(cached, qwen_dir, capsys):
    folder = cached / "cache/qwen_vl_features"
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    build_vl_cache.main(config(cached, qwen_dir))
    assert {
        p.name: p.stat().st_mtime_ns for p in folder.iterdir()
    } == before and "4 of 4 sessions are there, 0 to build" in capsys.readouterr().out
    gone = sorted(folder.iterdir())[1]
    content = ckpt.load_state(gone)
    kept = content["features"].clone()
    gone.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no features of 1 of 4 sessions: [\s\S]*build_vl_cache\.py[\s\S]*--cache online"
    ):
        read(cached, qwen_dir)
    build_vl_cache.main(config(cached, qwen_dir))
    assert "1 to build" in capsys.readouterr().out and torch.equal(
        ckpt.load_state(gone)["features"].nan_to_num(), kept.nan_to_num()
    )


def touch(path):
    s = path.stat()
    os.utime(path, ns=(s.st_atime_ns, s.st_mtime_ns + 10**9))


def change_image(root):
    path = sorted((root / "White_silicone_white_circle").rglob("View5/*.jpg"))[2]
    path.write_bytes(make_demo.jpeg(np.zeros((36, 64, 3), np.uint8)))


def touch_image(root):
    touch(sorted((root / "White_silicone_white_circle").rglob("View5/*.jpg"))[2])


def another_instruction(root):
    create_datapkl.main(
        parse_config(
            create_datapkl.Config,
            [
                "--dataset_dirs",
                str(root),
                "--workers",
                "0",
                "--instruction",
                "{White_silicone_white_circle: other words}",
            ],
        )
    )


def fewer_steps(root):
    path = next((root / "OCT_insertion").rglob("*.csv"))
    path.write_text("\n".join(path.read_text().splitlines()[:-40]) + "\n")
    create_datapkl.main(parse_config(create_datapkl.Config, ["--dataset_dirs", str(root), "--workers", "0"]))


def a_new_image(root):
    """Between two that were used: ticks now resolve to other image numbers."""
    path = sorted((root / "OCT_insertion").rglob("view1/left/*.jpg"))[1]
    stem, stamp = path.stem.rsplit("_", 1)
    shutil.copy2(path, path.with_name(f"{stem}_{float(stamp) + 0.02:.3f}.jpg"))
    create_datapkl.main(parse_config(create_datapkl.Config, ["--dataset_dirs", str(root), "--workers", "0"]))


@pytest.mark.parametrize(
    "change, message",
    [
        (change_image, r"image View5/\S+ changed"),
        (touch_image, r"image View5/\S+ was modified"),
        (another_instruction, "instruction was 'Insert the needle into the white circle', now 'other words'"),
        (fewer_steps, "ticks were 5, now 4|data.pkl was made again"),
        (a_new_image, "image of View1 at tick .* was number"),
    ],
)
def test_changed_sessions_are_refused_and_rebuilt(cached, qwen_dir, change, message):
    change(cached)
    with pytest.raises(vc.CacheMismatch, match=message):
        read(cached, qwen_dir)
    build_vl_cache.main(config(cached, qwen_dir))
    assert len(read(cached, qwen_dir)[0]) == 4


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(height=112), "height was 56, now 112"),
        (dict(width=112), "width was 84, now 112"),
        (dict(views=["View1"]), r"views was \['View1', 'View5'\], now \['View1'\]"),
        (dict(layer=1), "layer was -1, now 1"),
        (dict(tokens=2), "tokens was 1, now 2"),
        (dict(dtype="fp32"), "dtype was 'fp16', now 'fp32'"),
    ],
)
def test_other_settings_are_refused(built, qwen_dir, changed, message):
    with pytest.raises(vc.CacheMismatch, match=message):
        read(built, qwen_dir, **changed)


def test_another_model_is_refused_and_a_moved_one_is_not(built, qwen_dir, tmp_path):
    other = make_demo.write_qwen2_5_vl(tmp_path / "other", seed=9, text=(64, 2), vision=(32, 2))
    with pytest.raises(vc.CacheMismatch, match="weights was '.*', now '.*'"):
        read(built, other)
    assert len(read(built, shutil.copytree(qwen_dir, tmp_path / "moved"))[0]) == 4
    assert len(read(built, f"not/here/{qwen_dir.name}")[0]) == 4  # no model on this machine: its name is all there is
    with pytest.raises(vc.CacheMismatch, match="model was"):
        read(built, "Qwen/Qwen2.5-VL-7B-Instruct")


def test_reuse_must_be_a_multiple_of_the_stride(built, qwen_dir):
    assert len(read(built, qwen_dir, reuse=6)[0]) == 4
    with pytest.raises(vc.CacheMismatch, match="stride was 3, of which vlm_reuse_count 4 is no multiple"):
        read(built, qwen_dir, reuse=4)


def test_hashed_images_survive_lost_times(cached, qwen_dir, capsys):
    build_vl_cache.main(config(cached, qwen_dir, "--hash-images", "--prune"))
    assert "pruned    4 files" in capsys.readouterr().out
    for path in cached.rglob("*.jpg"):
        touch(path)
    assert len(read(cached, qwen_dir)[0]) == 4
    build_vl_cache.main(config(cached, qwen_dir, "--hash-images"))
    assert "0 to build" in capsys.readouterr().out


def test_two_kinds_that_fit_are_not_guessed_between(cached, qwen_dir):
    build_vl_cache.main(config(cached, qwen_dir, "--tokens", "2"))
    with pytest.raises(vc.CacheMismatch, match="more than one kind of features that fit: tokens is"):
        read(cached, qwen_dir)
    assert next(iter(read(cached, qwen_dir, tokens=2)[0].values())).shape == (5, 2, 64)
    build_vl_cache.main(
        config(cached, qwen_dir, "--vlm-reuse-count", "1", "--prune")
    )  # finer ticks of the same kind, the others go
    assert next(iter(read(cached, qwen_dir, reuse=4)[0].values())).shape == (15, 1, 64)


def test_verify_finds_a_wrong_feature(cached, qwen_dir, capsys):
    assert build_vl_cache.main(config(cached, qwen_dir, "--verify", "50")) == 0
    assert "computed again: largest difference" in capsys.readouterr().out
    path = sorted((cached / "cache/qwen_vl_features").iterdir())[0]
    content = ckpt.load_state(path)
    content["features"] = content["features"].clone() * 1.1
    ckpt.save_state(path.with_suffix(".new"), content)
    path.with_suffix(".new").replace(path)
    with pytest.raises(ValueError, match=f"{path.name}: the feature of tick . differs by 10"):
        build_vl_cache.main(config(cached, qwen_dir, "--verify", "50"))


def test_prune_leaves_what_is_not_asked_about(cached, qwen_dir, capsys):
    folder = cached / "cache/qwen_vl_features"
    (folder / ".tmp-1-x.pt").write_bytes(b"left by a kill")
    stranger = folder / f"Other__-__recv_all_9__{'a' * 24}.pt"
    old = folder / (sorted(folder.glob("White*"))[0].name[:-27] + "b" * 24 + ".pt")
    for path in (stranger, old):
        path.write_bytes(b"")
    build_vl_cache.main(config(cached, qwen_dir, "--prune"))
    assert (
        stranger.exists()
        and not old.exists()
        and not (folder / ".tmp-1-x.pt").exists()
        and "pruned    1 files; 1 of sessions that are not below" in capsys.readouterr().out
    )


def test_a_view_not_all_sessions_have_is_left_out_and_said(root, qwen_dir, capsys):
    s = ss.find_sessions([root])[0]
    shutil.rmtree(s.path / "View5")
    create_datapkl.main(parse_config(create_datapkl.Config, ["--dataset_dirs", str(root), "--workers", "0"]))
    assert build_vl_cache.main(config(root, qwen_dir)) == 0
    assert f"View5 is left out, for 1 of 4 sessions lack it, e.g. {s.name}" in capsys.readouterr().out
    assert read(root, qwen_dir)[1]["views"] == ["View1"]
    with pytest.raises(ss.BadSession, match="has no view 'View5'"):
        build_vl_cache.main(config(root, qwen_dir, "--views", "View1", "View5"))


def test_out_of_memory_halves_the_micro_batch(recordings, qwen_dir, encoder, monkeypatch):
    """At most 2 rows fit: 8 becomes 2, the features are the same; at one row it is an error that names session and keys."""
    s = ss.find_sessions([recordings])[0]
    ticks, most, whole = s.ticks(1, VIEWS), [2], encoder.encode

    def small(rows):
        if len(rows) > most[0]:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return whole(rows)

    monkeypatch.setattr(encoder, "encode", small)
    builder = build_vl_cache.Builder(encoder, 8, 2)
    features, computed = builder.features(s, ticks)
    assert (
        builder.micro_batch == 2
        and computed == len(build_vl_cache.unique_looks(ticks, VIEWS)[0]) < ticks.complete.sum()
    )
    monkeypatch.undo()
    assert torch.allclose(
        features.nan_to_num(), build_vl_cache.Builder(encoder, 1, 1).features(s, ticks)[0].nan_to_num(), atol=2e-3
    )
    monkeypatch.setattr(encoder, "encode", small)
    most[0] = 0
    with pytest.raises(
        ValueError, match=f"out of memory at {s.name} with one feature at a time: lower --image-resize-height"
    ):
        builder.features(s, ticks)


def test_a_stop_signal_keeps_what_is_finished(root, qwen_dir, capsys, monkeypatch):
    whole, calls = build_vl_cache.Builder.features, []

    def told_to_stop(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, *arguments)

    monkeypatch.setattr(build_vl_cache.Builder, "features", told_to_stop)
    assert build_vl_cache.main(config(root, qwen_dir)) == 1
    assert (
        "stopped by signal; 2 of 4 sessions were finished and stay" in capsys.readouterr().out
        and len(list((root / "cache/qwen_vl_features").iterdir())) == 2
    )
    assert (
        build_vl_cache.main(config(root, qwen_dir)) == 0
        and "2 of 4 sessions are there, 2 to build" in capsys.readouterr().out
    )


def test_a_feature_that_is_not_finite_is_not_written(root, qwen_dir, monkeypatch):
    whole = vc.VLEncoder.encode
    monkeypatch.setattr(vc.VLEncoder, "encode", lambda self, rows: whole(self, rows) * 1e9)
    with pytest.raises(ValueError, match=r"\S+/-/\S+: a feature is not finite in fp16"):
        build_vl_cache.main(config(root, qwen_dir))
    assert not list((root / "cache/qwen_vl_features").iterdir())


def test_the_shipped_config_parses():
    cfg = parse_config(build_vl_cache.Config, ["--config", str(ROOT / "configs/vl_cache.yaml"), "--dataset_dirs", "a"])
    assert cfg.dataset_dirs == ["a"] and (cfg.image_resize_height, cfg.image_resize_width, cfg.vlm_reuse_count) == (
        360,
        640,
        3,
    )


def test_shares_are_whole_and_even():
    sizes = [5, 9, 1, 7, 7, 3]
    shares = build_vl_cache.share_out(sizes, 3)
    assert sorted(i for share in shares for i in share) == list(range(6)) and [
        sum(sizes[i] for i in share) for share in shares
    ] == [10, 12, 10]
    assert build_vl_cache.share_out([], 2) == [[], []]


def test_check_needs_no_model(recordings, capsys):
    assert build_vl_cache.main(config(recordings, "no/model", "--check")) == 0
    out = capsys.readouterr().out
    assert (
        "seen as 84x56: 6 tokens per view, 12 per feature" in out
        and "check passed" in out
        and not (recordings / "cache").exists()
    )


def environment(tmp_path):
    """Of a single process; with a torchvision that breaks whoever imports it."""
    (tmp_path / "blocked/torchvision").mkdir(parents=True)
    (tmp_path / "blocked/torchvision/__init__.py").write_text("raise RuntimeError('torchvision is broken')")
    return {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | {
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(tmp_path / "blocked"),
    }


def test_a_killed_build_goes_on_and_two_ranks_make_the_same(tmp_path, root, built, qwen_dir):
    """kill -9 in the middle: what has a final name is whole, nothing else counts. torchrun with two processes does the rest; bit for bit what one process makes."""
    folder, env = root / "cache/qwen_vl_features", environment(tmp_path)
    script = [str(ROOT / "build_vl_cache.py"), "--dataset-dirs", str(root), "--model", str(qwen_dir), *SMALL]
    process = subprocess.Popen([sys.executable, *script], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 60
    while not list(folder.glob("[!.]*.pt")) and process.poll() is None and time.time() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for path in folder.glob("[!.]*.pt"):
        assert {"features", "meta"} <= set(ckpt.load_state(path))
    first = {p.name: p.stat().st_mtime_ns for p in folder.glob("[!.]*.pt")}
    assert first
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *script],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert {p.name: p.stat().st_mtime_ns for p in folder.glob("[!.]*.pt") if p.name in first} == first
    one = {p.name: ckpt.load_state(p)["features"] for p in (built / "cache/qwen_vl_features").glob("*.pt")}
    two = {p.name: ckpt.load_state(p)["features"] for p in folder.glob("[!.]*.pt")}
    assert set(one) == set(two) and all(torch.equal(one[n].nan_to_num(), two[n].nan_to_num()) for n in one)


def test_recordings_of_other_hands(shared, qwen_dir, tmp_path):
    """Real-format recordings, some with 9 views, one with 2: features of the views that all have."""
    root = tmp_path / "sessions"
    shutil.copytree(shared / "data/sessions", root, copy_function=shutil.copyfile)
    for p in [root, *root.rglob("*")]:
        os.chmod(p, 0o755 if p.is_dir() else 0o644)
    create_datapkl.main(parse_config(create_datapkl.Config, ["--dataset_dirs", str(root), "--workers", "0"]))
    assert build_vl_cache.main(config(root, qwen_dir, "--verify", "3")) == 0
    files, recipe = read(root, qwen_dir)
    assert recipe["views"] == VIEWS and sum(f.shape[0] for f in files.values()) == 10 + 47 + 10
