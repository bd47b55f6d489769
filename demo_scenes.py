"""make_demo.py's scenes as environments for closed-loop evaluation, and a recorder of corrections by their expert.

Each class is an environment as common/closed_loop.py describes it.

    python evaluate.py --checkpoint outputs/demo_nora --closed-loop demo_scenes:Insertion --scenes 50 --execute 4
    python demo_scenes.py --scene InsertionSim --episodes 200 --noise 1 --out demo/corrections    # more training data

Scene number k is the same on every machine and never a scene of the training: see scene_rng.
"""

import argparse
from pathlib import Path

import h5py
import numpy as np
from PIL import Image, ImageDraw
from PIL.ImageFont import load_default
from tqdm import tqdm

import make_demo as demo

CLOSED_LOOP, CORRECTIONS = 20261121, 20261122  # third part of the seeds, where make_demo has none or a small number


def scene_rng(seed, *more):
    """-> generator of closed-loop scene `seed`: a random stream that no recording uses."""
    return np.random.default_rng([seed, 1, CLOSED_LOOP, *more])


# ---- needle insertion ------------------------------------------------------------------------------------------------

TUBE_MM, TUBE_RAD = 3.0, 0.15  # how far off the axis, and tilted against it, the needle still fits into the trocar
REACH_MM = 6.0  # this far below the entry it is inserted
EYE_MM = 15.0  # radius of the eye, whose centre is 16 mm below the entry
ARM_MM, ARM_RAD = 4.0, 0.1  # largest motion of the arm in a frame
ARM_REACH = np.array([[-80, -80, -20, -1.2, -1.2, -9.0], [80, 80, 90, 1.2, 1.2, 9.0]])  # mm, rad
FUNNEL_MM = 2.0  # up to this far off the axis the expert goes on inserting


def insertion_law(pose, entry):
    """-> (6,) mm/rad, the expert's next motion: that of make_demo.simulate while the needle is on its path, else back
    to that path, first straight up if the needle is low beside the trocar."""
    target, goal = entry + [0, 0, demo.STANDOFF_MM], entry - [0, 0, demo.DEPTH_MM]
    gap, way, tilt, motion = target - pose[:3], goal - pose[:3], pose[3:5], np.zeros(6)
    aside, height, off = np.hypot(*gap[:2]), pose[2] - entry[2], np.abs(tilt).max()
    aligned = np.linalg.norm(gap) < 0.28 and off < 0.02
    inserting = height < demo.STANDOFF_MM - 0.5 and off < 0.1 and aside < (TUBE_MM if height < 0 else FUNNEL_MM)
    if aligned or inserting:
        motion[:3] = way * min(1.0, demo.INSERT_MM / max(np.linalg.norm(way), 1e-9))
        if off < 0.02:  # the recordings never correct a smaller tilt
            return motion
    elif height < 1.0:
        motion[2] = demo.INSERT_MM
    else:
        motion[:3] = gap * min(0.3, demo.ALIGN_MM / max(np.linalg.norm(gap), 1e-9))
    motion[3:5] = -np.clip(0.3 * tilt, -demo.ALIGN_RAD, demo.ALIGN_RAD)
    return motion


def pose_of(joints):
    """The exact inverse of make_demo.joint_angles: (6,) rad -> (6,) mm/rad. The first joint is kept within 1.2 rad."""
    x, z = np.linalg.solve([[-0.3, 0.8], [0.6, 0.4]], joints[1:3])
    y = np.tan(np.clip(joints[0], -1.2, 1.2)) * (x + 2)
    return np.array([100 * x, 100 * y, 100 * z, joints[3], joints[4], joints[5] - 0.2 * y])


class Insertion:
    """Needle and trocar of make_demo's insertion episodes, driven by ee_pose deltas in mm and rad. The arm does what is
    sent, within ARM_MM and ARM_RAD a frame and ARM_REACH. Inserted: the tip went through the mouth and REACH_MM below
    it, within TUBE_MM of the axis and TUBE_RAD of its direction, and never into the eye beside it."""

    units = ["mm"] * 3 + ["rad"] * 3  # of the action
    hz, verb = demo.HZ, "inserted"
    meters = False  # of state and deltas; else mm
    joints = False  # actions are joint targets; else pose deltas
    yaw_home = False  # the expert also turns the wrist to zero
    instruction = demo.INSTRUCTION
    state = ("ee_pose",)  # of "qpos", "ee_pose"
    lag = 0.0  # share of the commanded motion that is still missing at the next frame
    anchor = "target"  # a delta is added to the last commanded pose; "measured": to the arm's own
    near = 0.0  # share of scenes that start low and off the path, for recordings of corrections
    size, limit, looking = (96, 128), 80, True

    def reset(self, seed):
        return self.begin(scene_rng(seed), [seed, 3, CLOSED_LOOP])

    def begin(self, rng, noise):
        run, self.look, self.look_rng = demo.simulate(rng), None, rng
        self.entry, self.pose = run["entry"], run["pose"][0].copy()
        place = np.random.default_rng([*noise, self.limit + 1])
        if place.random() < self.near:
            aside, low = place.uniform(-8, 8, 2), place.uniform(1, 12)
            self.pose[:3], self.pose[3:5] = self.entry + [*aside, low], place.uniform(-0.3, 0.3, 2)
        self.command, self.noise, self.frame, self.rest = self.pose.copy(), noise, 0, 0
        self.inside, self.inserted, self.hit_eye, self.at_entry = False, False, False, None
        self.height = self.pose[2] - self.entry[2]
        return self.observe()

    def observe(self):
        arrays = dict(ee_pose=self.pose * self.scale(), qpos=demo.joint_angles(self.pose[None])[0])
        state = np.concatenate([arrays[key] for key in self.state]).astype(np.float32)
        return dict(images=self.images() if self.looking else {}, state=state, instruction=self.instruction)

    def images(self):
        rng = np.random.default_rng([*self.noise, self.frame])
        self.look = self.look or demo.randomise(self.look_rng, self.size)
        views = [demo.render(self.pose, self.entry, camera, self.look, rng) for camera in sorted(demo.CAMERAS)]
        named = dict(zip(sorted(demo.CAMERAS), views, strict=True))
        return named | {f"camera{k + 1}": view for k, view in enumerate(views)}

    def scale(self):
        return np.array([1e-3 if self.meters else 1.0] * 3 + [1.0] * 3)

    def step(self, action):
        base = self.pose if self.anchor == "measured" and not self.joints else self.command
        wanted = pose_of(action) if self.joints else base + np.asarray(action) / self.scale()
        motion = wanted - base
        motion[:3] *= min(1.0, ARM_MM / max(np.linalg.norm(motion[:3]), 1e-9))
        motion[3:] = np.clip(motion[3:], -ARM_RAD, ARM_RAD)
        self.command, before = np.clip(base + motion, *ARM_REACH), self.pose
        self.pose, self.frame = self.command + self.lag * (before - self.command), self.frame + 1
        for part in np.linspace(0, 1, 9)[1:]:  # less than half a mm each
            self._touch(before + part * (self.pose - before))
        still = np.linalg.norm(self.pose[:3] - before[:3]) < 0.1
        self.rest = self.rest + 1 if still else 0
        return self.observe(), self.frame >= self.limit or (self.inserted and self.rest >= 4)

    def _touch(self, pose):
        """Update what the tip has reached: the trocar's mouth, the eye, the depth."""
        (x, y, height), axis = pose[:3] - self.entry, demo.needle_axis(pose)
        aside = float(np.hypot(x, y))
        fits = aside <= TUBE_MM and np.arccos(np.clip(-axis[2], -1, 1)) <= TUBE_RAD
        if height <= 0 < self.height:  # through the plane of the mouth
            self.at_entry, self.inside = aside, fits
        self.height, self.inside = height, self.inside and fits and height <= 0
        self.hit_eye = self.hit_eye or (not self.inside and np.hypot(aside, height + EYE_MM + 1) < EYE_MM)
        self.inserted = self.inserted or (self.inside and height <= -REACH_MM)

    def success(self):
        distance = float(np.linalg.norm(self.pose[:3] - self.entry + [0, 0, demo.DEPTH_MM]))
        about = dict(success=bool(self.inserted and not self.hit_eye), distance_mm=distance)
        return about | dict(at_entry_mm=self.at_entry, hit_eye=bool(self.hit_eye))

    def motion(self):
        """-> (6,) mm/rad, the expert's motion from here."""
        motion = insertion_law(self.pose, self.entry)
        if self.yaw_home:
            motion[5] = -np.clip(0.3 * self.pose[5], -demo.ALIGN_RAD, demo.ALIGN_RAD)
        return motion

    def action_of(self, motion):
        """-> the action that moves the arm by `motion` (6,) mm/rad."""
        return demo.joint_angles((self.pose + motion)[None])[0] if self.joints else motion * self.scale()

    def expert(self):
        return self.action_of(self.motion())

    def hold(self):
        return self.action_of(np.zeros(6))

    def picture(self):
        """Side view and view from above, drawn for a person: eye, trocar with its wall, needle."""
        views = [self.sketch(axes, name) for axes, name in (((0, 2), "from the side"), ((0, 1), "from above"))]
        return np.concatenate(views, axis=1)

    def sketch(self, axes, name, zoom=3.0):
        above, tip = axes == (0, 1), self.pose[:3] - self.entry

        def at(*offset):  # mm from the entry -> pixels
            right, up = np.array(offset, float)[list(axes)]
            return 120 + zoom * right, (120 if above else 163) - zoom * up

        sheet = Sheet(name, at)
        sheet.disc([0, 0, -EYE_MM - 1], zoom * EYE_MM, (236, 200, 190))
        if above:
            sheet.disc([0, 0, 0], zoom * TUBE_MM + 3, (60, 90, 200))
            sheet.disc([0, 0, 0], zoom * TUBE_MM, (255, 255, 255))
        else:
            for wall in (-TUBE_MM, TUBE_MM):
                sheet.line([(wall, 0, 0), (wall, 0, -5)], (60, 90, 200))
            sheet.word([0, 0, -EYE_MM - 1], "eye")
            sheet.word([TUBE_MM + 2, 0, 0], "trocar")
            sheet.word(tip + [2, 0, 22], "needle")
        sheet.line([tip, tip - 28 * demo.needle_axis(self.pose)], (200, 40, 30))
        sheet.disc(tip, 4, (20, 20, 20))
        return sheet.pixels()


class InsertionSim(Insertion):
    """The same as guide 2's simulator records it: metres, joint targets, no instruction in the files."""

    units, meters, joints, yaw_home, instruction = ["rad"] * 6, True, True, True, None


class InsertionSimDelta(InsertionSim):
    """For a policy trained on these files with use_ee_pose_delta_as_action."""

    units, joints = ["m"] * 3 + ["rad"] * 3, False


# ---- two posts -------------------------------------------------------------------------------------------------------


class TwoPosts:
    """A red and a blue post, one of them named in the instruction, and a base driven by velocities in m per step of a
    path. Recorded paths lead to the post in 15 steps, with images from 2.5 m away or more; so the base looks three
    times, drives 4, 4 and 15 steps, and should then be at the post. Success: within its width, and not at the other."""

    units, steps, size, looking = ["m/step"] * 2, (4, 4, 15), (112, 160), True
    fastest = 0.6  # m per step

    def reset(self, seed):
        rng, self.noise = scene_rng(seed), [seed, 4, CLOSED_LOOP]
        self.posts, self.look = demo.place_posts(rng)
        for name, (x, y) in self.posts.items():  # further away on the same ray: there is a way to go
            self.posts[name] = np.array([x, y]) * rng.uniform(4.7, 6.0) / x
        self.named, self.other = rng.permutation(list(self.posts)).tolist()
        self.at, self.frame, self.way = np.zeros(2), 0, [np.zeros(2)]
        return self.observe()

    def observe(self):
        images = dict(camera1=self.camera()) if self.looking else {}
        return dict(images=images, instruction=f"Go to the {self.named} post")

    def camera(self):
        places = {name: place - self.at for name, place in self.posts.items()}
        rng = np.random.default_rng([*self.noise, self.frame])
        seen = {name: (x, y) for name, (x, y) in places.items() if x > 0.3}
        return demo.render_posts(seen, self.look, self.size, rng)

    def step(self, action):
        speed = np.asarray(action, float)
        speed = speed * min(1.0, self.fastest / max(np.linalg.norm(speed), 1e-9))
        self.at, self.frame = self.at + self.steps[self.frame] * speed, self.frame + 1
        self.way.append(self.at)
        return self.observe(), self.frame == len(self.steps)

    def success(self):
        away = {name: float(np.linalg.norm(place - self.at)) for name, place in self.posts.items()}
        there = {name: metres < demo.POST_M[0] for name, metres in away.items()}
        about = dict(success=there[self.named] and not there[self.other], distance_m=away[self.named])
        return about | dict(wrong_post=there[self.other])

    def expert(self):
        return (self.posts[self.named] - self.at) / 15

    def picture(self):
        sheet = Sheet(f"told: the {self.named} post", lambda x, y: (120 - 30 * y, 222 - 30 * x))
        for name, place in self.posts.items():
            sheet.disc(place, 12, demo.POSTS[name])
        sheet.line(self.way, (20, 20, 20))
        sheet.disc(self.at, 7, (20, 20, 20))
        return beside(sheet, self.camera())


# ---- mobile base -----------------------------------------------------------------------------------------------------


class MobileBase:
    """Two bottles and a box. The instruction names a side, and the base drives there by velocities, one per image; as
    in make_demo's mobile recordings images are taken in the middle of a motion. Success: after 24 motions the base is
    within 0.25 m of where the recordings stop, 0.45 m before the bottle."""

    units, size, limit, looking = ["m/s"] * 2, (72, 128), 24, True
    window = 8  # newest images in an observation

    def reset(self, seed):
        rng = scene_rng(seed)
        (self.bottles, self.look), self.side = demo.mobile_scene(rng), int(rng.integers(2))
        self.goals = self.bottles - [0.45, 0.0]
        self.at, self.frame, self.noise = np.zeros(2), 0, [seed, 5, CLOSED_LOOP]
        self.way, self.seen = [np.zeros(2)], [np.zeros(2)]  # after every motion; where every image is taken
        self.pictures = {}  # frame -> what was looked at
        return self.observe()

    def observe(self):
        frames = range(max(0, self.frame + 1 - self.window), self.frame + 1)
        for frame in frames if self.looking else ():
            if frame not in self.pictures:
                self.pictures[frame] = self.camera(frame)
        images = [self.pictures[frame] for frame in frames if self.looking]  # the same arrays: encoded once
        return dict(images=images, instruction=f"{demo.MOBILE_GOAL} {('left', 'right')[self.side]}")

    def camera(self, frame):
        rng = np.random.default_rng([*self.noise, frame])
        return demo.render_mobile(self.seen[frame], self.bottles, self.look, self.size, rng)

    def step(self, action):
        key = np.clip(np.asarray(action, float) / demo.MOBILE_SPEED, -1, 1)
        self.seen.append(self.at + demo.MOBILE_STEP / 2 * key)
        self.at, self.frame = self.at + demo.MOBILE_STEP * key, self.frame + 1
        self.way.append(self.at)
        return self.observe(), self.frame == self.limit

    def success(self):
        away = np.linalg.norm(self.goals - self.at, axis=1)
        near = away < 0.25
        about = dict(success=bool(near[self.side]), distance_m=float(away[self.side]))
        return about | dict(wrong_bottle=bool(near[1 - self.side]))

    def expert(self):
        return demo.MOBILE_SPEED * demo.mobile_key(self.goals[self.side] - self.at)

    def picture(self):
        told = f"told: the bottle on the {('left', 'right')[self.side]}"
        sheet = Sheet(told, lambda x, y: (120 - 80 * y, 225 - 80 * x))
        sheet.disc(self.look["box"], 12, (140, 90, 40))
        for place in self.bottles:
            sheet.disc(place, 7, (40, 150, 60))
        sheet.line(self.way, (20, 20, 20))
        sheet.disc(self.at, 7, (20, 20, 20))
        return beside(sheet, self.camera(self.frame))


# ---- robot sessions: turntable, tissue, force ------------------------------------------------------------------------


class Turntable:
    """The trocar goes round on a turntable and the tissue below it breathes; the tip has to follow both, by pose deltas
    of 100 ms in mm and degrees, for six seconds. The reference path is what the recordings' controller would do from
    the same start. Success: over the last three seconds the tip's mean distance from it is below FOLLOW_MM, and below
    half of that of an arm that holds still. A constant offset in height or twist does not count: the sensor shows how
    the tissue moves, and nothing shows how high above it the tip is."""

    units, hz, seconds, size, looking = ["mm"] * 3 + ["deg"] * 3 + [""], 10.0, 6.0, (72, 128), True
    breathes = True  # False: the stiff phantom of the recordings without a sensor
    window = 650  # sensor rows in an observation
    instruction = "Insert the needle into the white circle"

    def reset(self, seed):
        self.run = demo.simulate_session(scene_rng(seed), self.seconds + 0.1, self.breathes)
        self.noise, self.frame = [seed, 6, CLOSED_LOOP], 0
        self.trocar = self.run["pose"][:, :2] - self.run["offset"]  # mm, the camera's middle
        self.pose, self.errors, self.held = self.run["pose"][0].copy(), [], []
        return self.observe()

    def observe(self):
        """Images and sensor rows up to now."""
        if not self.looking:
            return dict(images={}, sensor=None, instruction=self.instruction)
        rng, stamps = np.random.default_rng([*self.noise, self.frame]), self.frame / self.hz
        offset = self.pose[:2] - self.trocar[self.now()]
        images = {view: demo.render_session(offset, view, self.size, rng) for view in ("View1", "View5")}
        stamps = stamps - np.arange(min(self.window, 1 + int(650 * stamps)))[::-1] / 650
        rows = np.column_stack(demo.session_sensor(self.run, stamps, rng)) if self.breathes else None
        return dict(images=images, sensor=rows, instruction=self.instruction)

    def now(self):
        return round(100 * self.frame / self.hz)  # row of the simulation

    def step(self, action):
        motion = np.asarray(action, float)[:6]
        motion = np.clip(motion, -8, 8)  # mm, degrees: what the arm can do in 100 ms
        self.pose, self.frame = self.pose + motion, self.frame + 1
        self.errors.append(wrapped(self.pose - self.run["pose"][self.now()]))
        self.held.append(wrapped(self.run["pose"][0] - self.run["pose"][self.now()]))
        return self.observe(), self.frame >= self.seconds * self.hz

    def success(self):
        late, held = np.array(self.errors)[-30:], np.array(self.held)[-30:]
        for error in (late, held):
            error[:, [2, 5]] -= error[:, [2, 5]].mean(0)
        follow, still = (float(np.linalg.norm(e[:, :3], axis=1).mean()) for e in (late, held))
        sizes = dict(table_mm=np.hypot(*late[:, :2].T), tissue_mm=np.abs(late[:, 2]), twist_deg=np.abs(late[:, 5]))
        about = dict(success=follow < FOLLOW_MM and follow < still / 2, off_mm=follow)
        return about | {name: float(size.mean()) for name, size in sizes.items()}

    def expert(self):
        """What the recordings' controller does from here in 100 ms: xy by its own law, the rest to the reference."""
        xy, now = self.pose[:2].copy(), self.now()
        for i in range(now, now + 10):
            xy = xy + 2.5 * (self.trocar[i] - xy) / 100
        after = self.run["pose"][now + 10].copy()
        after[3:6] += [0.3 * (xy[1] - after[1]), -0.3 * (xy[0] - after[0]), 0.1 * (xy[0] - after[0])]
        after[:2] = xy
        return np.append(wrapped(after - self.pose), 1.0)

    def picture(self):
        """The table with trocar and tip, and from the side the tissue and the tip's height."""
        now, middle = self.now(), self.trocar.mean(0)
        top = Sheet("turntable from above", lambda x, y: (110 + 4.5 * (x - middle[0]), 120 + 4.5 * (y - middle[1])))
        top.line([middle + [15 * np.cos(a), 15 * np.sin(a)] for a in np.linspace(0, 6.3, 50)], (210, 210, 210))
        top.disc(self.run["pose"][now, :2], 10, (170, 220, 170))
        top.word(self.run["pose"][now, :2] + [3, 0], "should be here")
        top.disc(self.trocar[now], 7, (60, 90, 200))
        top.disc(self.pose[:2], 5, (20, 20, 20))
        side = Sheet("tissue from the side", lambda x, z: (120 + x, 120 - 12 * (z - 245)))
        height = self.run["pose"][now, 2]
        side.line([(-100, height), (100, height)], (220, 150, 140))
        side.line([(0, self.pose[2] + 9), (0, self.pose[2])], (200, 40, 30))
        side.disc((0, self.pose[2]), 5, (20, 20, 20))
        top.word(self.trocar[now] + [2, 0], "trocar")
        return np.concatenate([top.pixels(), side.pixels()], axis=1)


FOLLOW_MM = 3.0


def wrapped(error):
    """-> the pose difference with its rotations wrapped to -180..180 degrees."""
    return np.concatenate([error[:3], (error[3:6] + 180) % 360 - 180])


# ---- images for a person ---------------------------------------------------------------------------------------------


class Sheet:
    """A light square to draw on; at(*place in the scene) -> pixels."""

    def __init__(self, title, at, side=240):
        self.picture, self.at = Image.new("RGB", (side, side), (244, 244, 240)), at
        self.draw = ImageDraw.Draw(self.picture)
        self.draw.text((6, 4), title, (90, 90, 90), load_default(12))

    def disc(self, place, radius, fill):
        x, y = self.at(*place)
        self.draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=fill)

    def line(self, places, fill):
        points = [tuple(float(v) for v in self.at(*place)) for place in places]
        self.draw.line(points, fill=fill, width=4)

    def word(self, place, text):
        self.draw.text(self.at(*place), text, (90, 90, 90), load_default(12))

    def pixels(self):
        return np.asarray(self.picture)


def beside(sheet, camera):
    height = sheet.picture.height
    picture = Image.fromarray(camera).resize((round(height * camera.shape[1] / camera.shape[0]), height))
    return np.concatenate([sheet.pixels(), np.asarray(picture)], axis=1)


# ---- recordings of corrections ---------------------------------------------------------------------------------------


def write_corrections(folder, scene, episodes=200, seed=0, noise=0.0, near=0.7):
    """Insertion episodes in make_demo's file format. A share `near` of them starts low and off the path, and in every
    frame the arm is pushed by `noise` mm and `noise` / 30 rad, in one of six by 3 x that. The recorded `action` is the
    expert's own, for the motion that follows. Without noise the poses differ by just that, so that these files and
    make_demo's can be trained on together."""
    folder, spread = Path(folder), noise * np.array([1, 1, 1, 1 / 30, 1 / 30, 0])
    folder.mkdir(parents=True, exist_ok=True)
    scene.near = near
    for i in tqdm(range(episodes), desc="corrections", unit="episode", disable=None):
        rng, frames, rest = np.random.default_rng([seed, i, CORRECTIONS]), [], 0
        seen = scene.begin(rng, [seed, i, CORRECTIONS, 1])
        while len(frames) < scene.limit and rest < 4:
            motion = scene.motion()
            rest += scene.success()["distance_mm"] < 0.1 + 2 * noise
            frames.append(dict(pose=scene.pose, action=scene.action_of(motion), images=seen["images"]))
            push = spread * rng.normal(size=6) * (3 if rng.random() < 1 / 6 else 1)
            seen, _ = scene.step(scene.action_of(motion + push))
        write_episode(folder / f"episode_20260201_{demo.hhmmss(i)}.h5", scene, frames)


def write_episode(path, scene, frames):
    pose = np.stack([frame["pose"] for frame in frames])
    with h5py.File(path, "w") as f:
        f["action"] = np.stack([frame["action"] for frame in frames]).astype(np.float32)
        f["observations/ee_pose"] = (pose * scene.scale()).astype(np.float32)
        f["observations/qpos"] = demo.joint_angles(pose).astype(np.float32)
        for k, camera in enumerate(sorted(demo.CAMERAS)):
            images = [frame["images"][f"camera{k + 1}"] for frame in frames]
            demo.write_images(f, f"observations/images/{camera}", images, "jpeg")
        f["timestamp"] = (np.arange(1, len(frames) + 1) / scene.hz).astype(np.float32)
        if scene.instruction:
            f["language_instruction"] = scene.instruction


SCENES = dict(Insertion=Insertion, InsertionSim=InsertionSim)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scene", choices=SCENES, default="Insertion", help="whose corrections are recorded")
    parser.add_argument("--out", default="demo/corrections", help="folder to write into (default: demo/corrections)")
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--noise", type=float, default=0.0, help="mm by which the arm is pushed in every frame")
    parser.add_argument("--near", type=float, default=0.7, help="share of episodes that start low and off the way")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_corrections(args.out, SCENES[args.scene](), args.episodes, args.seed, args.noise, args.near)
    print(f"{args.episodes} episodes: {args.out}")


if __name__ == "__main__":
    main()
