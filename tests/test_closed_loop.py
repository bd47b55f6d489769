"""common/closed_loop.py and demo_scenes.py: what is sent of chunks, the scenes' laws and measures by hand, the
baselines, the report; scenes that no training saw."""

import json

import h5py
import numpy as np
import pytest

import demo_scenes
import make_demo
from common import UserError, closed_loop
from common import episodes as ep
from common.closed_loop import Plan, drive


class Line:
    """A point on a line that must come to `goal` = seed + 2 within 0.3; an action is a motion of at most 1."""

    units, hz = ["mm"], 10.0

    def reset(self, seed):
        self.x, self.goal, self.frame, self.seen = 0.0, seed + 2.0, 0, 0
        return self.observe()

    def observe(self):
        self.seen += self.looking
        images = dict(camera1=np.full((4, 6, 3), int(self.x * 20), np.uint8), small=np.zeros((3, 2, 3), np.uint8))
        return dict(images=images, gap=self.goal - self.x)

    def step(self, action):
        self.x, self.frame = self.x + float(np.clip(action[0], -1, 1)), self.frame + 1
        return self.observe(), self.frame == 10

    def success(self):
        away, gone = abs(self.goal - self.x), np.nan if self.goal == 2 else 7.0
        return dict(success=np.less(away, 0.3), distance_mm=np.float32(away), late=self.frame > 5, gone=gone, no=None)

    def expert(self):
        return np.array([np.clip(self.goal - self.x, -1, 1)])


class Walker:
    """Walks the way that is left within its chunk of 4, or a wrong one; counts the observations of every call."""

    def __init__(self, wrong=0.0, unit="mm"):
        self.wrong, self.unit, self.calls, self.resets = wrong, unit, [], 0

    def reset(self):
        self.resets += 1

    def describe(self):
        actions = [dict(name="x", unit=self.unit)]
        return dict(kind="delta", horizon=4, latency_ms=1.5, actions=actions, recorded={}, skip=0)

    def predict(self, observations):
        self.calls.append(len(observations))
        gaps = np.array([o["gap"] for o in observations])
        return np.repeat((gaps + self.wrong)[:, None, None] / 4, 4, axis=1).astype(np.float32)


def compare(policy, *args, **how):
    return closed_loop.compare(policy, policy.describe(), *args, **how)


# ---- what is sent ----------------------------------------------------------------------------------------------------
def sent(delta, ensemble, chunks, execute=1, steps=3):
    plan, out = Plan(delta, ensemble), []
    for step in range(steps):
        if step % execute == 0:
            plan.add(np.array(chunks[step // execute], float)[:, None])
        out.append(float(plan.next()[0]))
    return out


def test_what_is_sent_by_hand():
    """Without ensemble the newest chunk. With it, step 1 is in two chunks, step 2 in three; the oldest weighs most.
    Deltas are averaged as targets on what was sent: 1 was sent; the first chunk says 1 + 1 = 2 for step 1, the second
    1 + 3 = 4: the mean is 3, a motion of 2."""
    chunks, w = [[1, 2, 3], [4, 5, 6], [7, 8, 9]], np.exp(-0.5 * np.arange(3))
    assert sent(False, None, chunks) == [1, 4, 7] and sent(True, None, chunks, execute=2) == [1, 2, 4]
    expected = [1, (2 * w[0] + 4 * w[1]) / w[:2].sum(), (3 * w[0] + 5 * w[1] + 7 * w[2]) / w.sum()]
    assert sent(False, 0.5, chunks) == pytest.approx(expected)
    assert sent(False, 0.0, [[1, 1], [3, 3], [5, 5]]) == pytest.approx([1, 2, 4])  # the first has ended

    assert sent(True, 0.0, [[1, 1], [3, 3], [1, 1]], steps=3) == pytest.approx([1, 2, (7 + 4) / 2 - 3])
    assert sent(True, 0.3, [[2, 2, 2]] * 5, steps=5) == pytest.approx([2] * 5)


def test_chunks_are_executed_by_rows_and_scenes_in_one_call():
    walker, scenes = Walker(), [Line() for _ in range(3)]
    runs = drive(lambda _, seen: walker.predict(seen), scenes, [0, 1, 2], True, execute=4)
    assert walker.calls == [3, 3, 3] and [run["steps"] for run in runs] == [10] * 3
    assert [run["success"] for run in runs] == [True] * 3 and runs[2]["actions"][:4, 0].tolist() == [1.0] * 4
    assert scenes[0].seen == 3  # of 11 observations
    with pytest.raises(UserError, match="--execute 5: a chunk has 4 rows"):
        drive(lambda _, seen: walker.predict(seen), [Line()], [0], True, execute=5)
    with pytest.raises(UserError, match=r"scene 7, step 0: the action is \[nan\]"):
        drive(lambda *_: np.full((1, 1, 1), np.nan), [Line()], [7], True)


def test_the_policy_beside_its_baselines():
    """Goals 2, 3 and 4 mm: the expert comes to all; what it did in the next scene leads 1 mm too far."""
    walker = Walker()
    found = compare(walker, Line, [0, 1, 2], execute=2, batch_size=2)
    reports = {who: closed_loop.summarise(runs) for who, runs in found.items()}
    assert {who: r["success"] for who, r in reports.items()} == dict(policy=3, expert=3, replay=0) | {"hold still": 0}
    assert reports["hold still"]["distance_mm"] == 3 and reports["replay"]["distance_mm"] == pytest.approx(1)
    assert [reports["policy"][key] for key in ("late", "gone", "no")] == [3, 7, None]
    assert set(walker.calls) == {2, 1} and walker.resets == 1
    assert closed_loop.summarise(compare(Walker(1.0), Line, [0], 2)["policy"])["success"] == 0
    with pytest.raises(UserError, match=r"actions are in \['m'\], the environment takes \['mm'\]"):
        compare(Walker(unit="m"), Line, [0])
    compare(Walker(unit=""), Line, [0])  # recorded actions have none


def test_rows_that_are_over_are_not_sent():
    """The row of the motion that the newest image shows comes first in its chunk."""

    class Late(Walker):
        def describe(self):
            return super().describe() | dict(horizon=5, skip=1)

        def predict(self, observations):
            chunk = super().predict(observations)
            return np.concatenate([np.full_like(chunk[:, :1], 9), chunk], axis=1)

    found = compare(Late(), Line, [0, 1, 2], execute=4)
    assert closed_loop.summarise(found["policy"])["success"] == 3
    with pytest.raises(UserError, match="--execute 5: a chunk has 4 rows"):
        compare(Late(), Line, [0], execute=5)


def test_pictures_go_by_the_recorders_names():
    """A policy that numbers its cameras in another order than the environment."""

    class Looking(Walker):
        def describe(self):
            return super().describe() | dict(recorded=dict(camera1="top_camera", camera2="none"))

        def predict(self, observations):
            self.seen = [o["images"] for o in observations]
            return super().predict(observations)

    class Two(Line):
        def observe(self):
            seen = super().observe()
            return seen | dict(images=dict(camera1="side", camera2="top", side_camera="side", top_camera="top"))

    policy = Looking()
    compare(policy, Two, [0], execute=4)
    assert policy.seen[0]["camera1"] == "top" and policy.seen[0]["camera2"] == "top"


WRONG = [
    ("reset", ({}, {}), "Wrong.reset gives dict, dict; expected an observation, which is a dict"),  # gymnasium's
    ("step", ({}, 0.0, True, False, {}), r"step gives dict, float, bool, bool, dict; expected .observation, done."),
    ("success", dict(done=True), "success gives dict; expected a dict with 'success'"),
]


@pytest.mark.parametrize("method, gives, message", WRONG)
def test_an_environment_that_gives_something_else_is_refused_in_one_line(method, gives, message):
    with pytest.raises(UserError, match=message):
        compare(Walker(), type("Wrong", (Line,), {method: lambda *_: gives}), [0])
    with pytest.raises(UserError, match=f"Wrong has no method {method}: no environment"):
        compare(Walker(), type("Wrong", (Line,), {method: None}), [0])


def test_the_report(tmp_path, capsys, monkeypatch):
    assert closed_loop.wilson(40, 50) == pytest.approx((0.6696, 0.8876), abs=1e-4)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_lab.py").write_text("from test_closed_loop import Line\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(demo_scenes.Path(__file__).parent))
    reports = closed_loop.run(Walker(), "my_lab:Line", tmp_path / "out", scenes=3, execute=2)
    written = json.loads((tmp_path / "out/closed_loop.json").read_text(), parse_constant=pytest.fail)
    assert [run["gone"] for run in written["scenes"]["policy"]] == [None, 7, 7]
    assert written["summary"] == json.loads(json.dumps(reports)) and written["policy"]["kind"] == "delta"
    assert [run["distance_mm"] for run in written["scenes"]["hold still"]] == [2, 3, 4]
    assert (tmp_path / "out/closed_loop.png").stat().st_size > 5000
    said = capsys.readouterr().out
    assert "3 of 3" in said and "2 of each chunk's rows sent" in said and "one observation: 2 ms" in said
    for name, message in {"my_lab": "module:Class", "my_lab:Cube": "has no Cube", "no.thing:X": "no module no"}.items():
        with pytest.raises(UserError, match=message):
            closed_loop.open_environment(name)
    # the strip drives again, and says where that differs
    [run] = drive(lambda *_: np.ones((1, 1, 1)), [Line()], [0], True)
    pictures, same = closed_loop.film(Line, run, 3)
    assert [step for step, _ in pictures] == [0, 5, 10] and [p[0, 0, 0] for _, p in pictures] == [0, 100, 200] and same
    assert not closed_loop.film(Line, run | dict(success=True), 3)[1]
    with pytest.raises(UserError, match=r"Gray gives an image of float64 \(4, 6\); expected uint8 \(h, w, 3\)"):
        closed_loop.film(type("Gray", (Line,), dict(picture=lambda _: np.zeros((4, 6)))), run, 3)


# ---- needle insertion ------------------------------------------------------------------------------------------------
def test_no_training_saw_the_scenes():
    """Not of the recordings with any seed, nor of corrections, though streams of short seeds are padded with zeros."""
    ours = {tuple(make_demo.simulate(demo_scenes.scene_rng(k))["entry"]) for k in range(60)}
    assert len(ours) == 60
    for seed in range(4):
        for i in range(60):
            theirs = [make_demo.simulate(np.random.default_rng(words))["entry"] for words in ([seed, i], [seed, 7, i])]
            theirs.append(make_demo.simulate(np.random.default_rng([seed, i, demo_scenes.CORRECTIONS]))["entry"])
            assert not ours & {tuple(entry) for entry in theirs}


@pytest.mark.parametrize("cls", [demo_scenes.Insertion, demo_scenes.InsertionSim, demo_scenes.InsertionSimDelta])
def test_the_expert_does_what_the_recordings_show(cls):
    """Frame by frame on the recorded way, and it inserts; holding still and the replay do not."""
    for seed in range(12):
        scene = cls()
        scene.looking = False
        scene.reset(seed)
        recorded, done = make_demo.simulate(demo_scenes.scene_rng(seed))["pose"], False
        for pose in recorded[1:]:
            assert not done
            _, done = scene.step(scene.expert())
            np.testing.assert_allclose(scene.pose[:5], pose[:5], atol=1e-9)
        result = scene.success()
        assert result["success"] and result["distance_mm"] < 1e-6 and result["at_entry_mm"] < 0.4
        before = scene.pose.copy()
        scene.step(scene.hold())
        np.testing.assert_allclose(scene.pose, before, atol=1e-9)


def placed(pose_from_entry, **options):
    scene = demo_scenes.Insertion()
    scene.looking = False
    scene.reset(0)
    vars(scene).update(options)
    scene.pose = np.concatenate([scene.entry, np.zeros(3)]) + pose_from_entry
    scene.command, scene.height = scene.pose.copy(), scene.pose[2] - scene.entry[2]
    return scene


def push(scene, motion, steps):
    for _ in range(steps):
        scene.step(np.array(motion, float))
    return scene.success()


DOWN = [0, 0, -1, 0, 0, 0]
DIVES = [  # tip from the entry, mm and rad; success, hit_eye
    ([0, 0, 2, 0, 0, 0], True, False),
    ([2.9, 0, 2, 0, 0, 0], True, False),
    ([3.1, 0, 2, 0, 0, 0], False, True),
    ([0, 0, 2, 0.14, 0, 0], True, False),
    ([0, 0, 2, 0.16, 0, 0], False, True),
    ([0, 0, 2, 0.11, 0.11, 0], False, True),  # 0.156 rad together
    ([14, 0, 2, 0, 0, 0], False, False),  # 7 mm down, the eye is still further down there
]


@pytest.mark.parametrize("start, inserted, hit", DIVES)
def test_inserted_means_through_the_mouth_and_deep_enough(start, inserted, hit):
    scene = placed(start)
    assert not push(scene, DOWN, 7)["success"]  # 5 mm below
    result = push(scene, DOWN, 2)
    assert (result["success"], result["hit_eye"]) == (inserted, hit)
    assert result["at_entry_mm"] == pytest.approx(np.hypot(start[0], start[1]))


def test_what_went_wrong_once_stays_wrong():
    """Into the eye beside the trocar, out again, and in through the mouth."""
    scene = placed([5, 0, 2, 0, 0, 0])
    assert push(scene, DOWN, 5)["hit_eye"]
    push(scene, [0, 0, 1, 0, 0, 0], 5)
    push(scene, [-1, 0, 0, 0, 0, 0], 5)
    result = push(scene, DOWN, 10)
    assert result["at_entry_mm"] < 1e-9 and not result["success"] and result["hit_eye"]
    sideways = placed([8, 0, -0.5, 0, 0, 0])  # through the tube's wall, not through its mouth
    push(sideways, [-1, 0, 0, 0, 0, 0], 8)
    assert not push(sideways, DOWN, 8)["success"]


def test_the_arm_does_what_it_can():
    scene = placed([0, 0, 20, 0, 0, 0])
    before = scene.pose.copy()
    scene.step(np.array([30, 40, 0, 1.0, -1.0, 0.05]))
    np.testing.assert_allclose(scene.pose - before, [2.4, 3.2, 0, 0.1, -0.1, 0.05], atol=1e-12)
    scene.looking = True
    for way in ([0, 0, 4], [4, 0, 0], [0, -4, 0], [0, 0, -4]):  # wherever it goes it can be seen, or at least drawn
        push(scene, [*way, 0.1, 0.1, 0.1], 60)
        assert (np.abs(scene.pose) <= np.abs(demo_scenes.ARM_REACH).max(0)).all()
    ends = {}  # it lags: anchored to where it was measured, 40 % of every motion is lost, on the last target 0.7 mm
    for anchor in ("target", "measured"):
        scene = placed([0, 0, 20, 0, 0, 0], lag=0.4, anchor=anchor)
        push(scene, DOWN, 10)
        ends[anchor] = 20 - (scene.pose[2] - scene.entry[2])
    assert ends["target"] == pytest.approx(10 - 0.4 / 0.6, abs=0.01) and ends["measured"] == pytest.approx(6)


def test_the_expert_comes_back_from_off_the_way():
    rng = np.random.default_rng(3)
    for _ in range(40):
        place = [*rng.uniform(-8, 8, 2), rng.uniform(1, 36), *rng.uniform(-0.3, 0.3, 2), 0]
        scene = placed(np.array(place))
        while not scene.step(scene.expert())[1]:
            pass
        result = scene.success()
        assert result["success"] and result["distance_mm"] < 0.5 and not result["hit_eye"], place


def test_corrections_are_recordings_like_the_others(tmp_path):
    """Without noise both definitions of an action agree; with it the recorded one is still the expert's."""
    small, sim = demo_scenes.Insertion(), demo_scenes.InsertionSim()
    small.size = sim.size = (24, 32)
    demo_scenes.write_corrections(tmp_path / "clean", small, 1, seed=5, near=1.0)
    demo_scenes.write_corrections(tmp_path / "noisy", sim, 1, seed=5, noise=0.8)
    (clean, _), (noisy, _) = (ep.load_episodes(str(tmp_path / name)) for name in ("clean", "noisy"))
    assert not ep.doubts(clean, ep.define_action(clean, False)) and ep.detect_position_unit(clean) == "mm"
    for e in clean:
        np.testing.assert_allclose(ep.define_action(clean, True).targets(e), e.action[:-1], atol=1e-4)
    scene = demo_scenes.InsertionSim()
    for e in noisy:
        with h5py.File(e.path) as f:
            assert "language_instruction" not in f and len(f["observations/images/side_camera"]) == e.num_frames
        places = e.ee_pose[:, :3] / scene.scale()[:3]
        said = np.stack([demo_scenes.pose_of(action)[:3] for action in e.action[:-1]]) - places[:-1]
        apart = np.linalg.norm(np.diff(places, axis=0) - said, axis=1)
        assert 0.5 < apart.mean() < 4 and np.linalg.norm(said, axis=1).max() < 3.1
        assert np.linalg.norm(said[-1]) < 2 * demo_scenes.demo.INSERT_MM


def test_pictures_are_those_of_the_recordings():
    """The same pose, look and noise give the same pixels; what a scene shows does not depend on who looked before."""
    scene, again = demo_scenes.Insertion(), demo_scenes.Insertion()
    first = scene.reset(4)
    assert first["images"]["camera1"].shape == (96, 128, 3)
    rng = demo_scenes.scene_rng(4)
    run, look = make_demo.simulate(rng), make_demo.randomise(rng, (96, 128))
    noise = np.random.default_rng([4, 3, demo_scenes.CLOSED_LOOP, 0])
    expected = make_demo.render(run["pose"][0], run["entry"], "side_camera", look, noise)
    np.testing.assert_array_equal(first["images"]["camera1"], expected)
    again.looking = False
    assert again.reset(4)["images"] == {}
    again.looking = True
    seen, same = scene.step(scene.expert())[0], again.step(again.expert())[0]
    np.testing.assert_array_equal(seen["images"]["camera3"], same["images"]["camera3"])


# ---- the other scenes ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cls", [demo_scenes.TwoPosts, demo_scenes.MobileBase, demo_scenes.Turntable])
def test_the_expert_does_the_task_and_holding_still_does_not(cls):
    for seed in range(6):
        for share in (0, 1):
            scene, done = cls(), False
            scene.looking = False
            scene.reset(seed)
            while not done:
                _, done = scene.step(share * scene.expert())
            assert scene.success()["success"] == share
    scene, again = cls(), cls()
    first, same, other = scene.reset(0), again.reset(0), cls().reset(1)
    images = [seen["images"] for seen in (first, same, other)]
    pixels = [np.stack(list(shown.values()) if isinstance(shown, dict) else shown) for shown in images]
    assert (pixels[0] == pixels[1]).all() and (pixels[0] != pixels[2]).any()
    assert scene.picture().dtype == np.uint8 and scene.picture().shape[0] == 240


def test_the_wrong_post_is_no_success():
    scene = demo_scenes.TwoPosts()
    text = scene.reset(3)["instruction"]
    assert text == f"Go to the {scene.named} post"
    scene.named, scene.other = scene.other, scene.named
    done = False
    while not done:
        _, done = scene.step(scene.expert())
    scene.named, scene.other = scene.other, scene.named
    result = scene.success()
    assert result["wrong_post"] and not result["success"] and result["distance_m"] > 2
    scene.reset(3)
    scene.step([30.0, 40.0])  # 0.6 m a step, for four of them
    np.testing.assert_allclose(scene.at, [4 * 0.36, 4 * 0.48])


def test_the_mobile_expert_presses_the_recordings_keys():
    """The same scene as make_demo.drive draws: the same keys, and images taken in the middle of the motion."""
    scene, again = demo_scenes.MobileBase(), demo_scenes.MobileBase()
    for seed in (0, 3, 6):  # whose recordings start on the path
        again.looking = False
        seen, _ = scene.reset(seed), again.reset(seed)
        images, actions = make_demo.drive(demo_scenes.scene_rng(seed), scene.side, scene.size, 6)
        np.testing.assert_allclose(seen["images"][0].astype(float).mean(), images[0].mean(), atol=1)
        for t in range(1, 6):
            action = scene.expert()
            np.testing.assert_allclose(action, actions[t][:2])
            again.looking = t == 5  # images of the past do not depend on who looked
            seen, same = scene.step(action)[0], again.step(action)[0]
            assert len(seen["images"]) == t + 1
            difference = seen["images"][-1].astype(float) - images[t]
            assert np.abs(difference).mean() < 4  # the sensor's noise
        np.testing.assert_array_equal(np.stack(seen["images"]), np.stack(same["images"]))
        while not scene.step(scene.expert())[1]:
            pass
        assert len(scene.observe()["images"]) == scene.window


def test_the_turntable_is_felt_and_seen():
    """Force and peak of the A-scan are those of now; the expert comes back to the way after a push."""
    scene = demo_scenes.Turntable()
    seen = scene.reset(1)
    assert seen["sensor"].shape == (1, 1026) and seen["images"]["View1"].shape == (72, 128, 3)
    for _ in range(12):
        seen, _ = scene.step(scene.expert())
    rows = seen["sensor"]
    assert rows.shape == (650, 1026) and abs(rows[-1, 0] - (1 + 0.8 * scene.run["twist"](1.2))) < 0.15
    assert abs(rows[-1, 1:].argmax() - 500 - 120 * scene.run["height"](1.2)) < 12
    scene.looking = False
    scene.step([5, -5, 4, 0, 0, 3, 1])
    pushed = np.abs(scene.errors[-1])
    for _ in range(20):
        scene.step(scene.expert())
    assert pushed[:3].max() > 4 and np.abs(scene.errors[-1]).max() < 0.1
    for _ in range(27):
        scene.step(scene.expert())
    late = np.array(scene.errors)[-30:, 2]
    scene.errors = [error + np.array([0, 0, 2, 0, 0, 2]) for error in scene.errors]  # too high all the time
    result = scene.success()
    assert result["tissue_mm"] == pytest.approx(np.abs(late - late.mean()).mean()) and result["success"]
    scene.errors = [error + np.array([4, 0, 0, 0, 0, 0]) for error in scene.errors]
    assert scene.success()["table_mm"] == pytest.approx(4, abs=0.1) and not scene.success()["success"]
    stiff = demo_scenes.Turntable()
    stiff.breathes = False
    assert stiff.reset(1)["sensor"] is None
