r"""A scene of your own in MuJoCo, from recording to driving: docs/closed_loop.md shows the class below.

    pip install mujoco                     # not a requirement of this collection; run with 4.0, MUJOCO_GL=egl or osmesa
    python benchmarks/mujoco_insertion.py --episodes 120 --out demo/mujoco
    python make_demo.py smolvlm2
    python train_smolvla_sim.py --config configs/demo/smolvla_sim.yaml --dataset.root_dir demo/mujoco \
        --dataset.cameras front_camera side_camera tool_camera --output_dir outputs/mujoco
    python evaluate.py --checkpoint outputs/mujoco/checkpoints --closed-loop benchmarks.mujoco_insertion:MyInsertion \
        --scenes 20 --execute 4

The arm is a stand-in of six hinges; the expert goes above the entry and then down."""

import argparse
import io
from pathlib import Path

import h5py
import mujoco
import numpy as np
from PIL import Image

MODEL = """
<mujoco model="arm of six hinges over an eye">
  <compiler angle="radian"/>
  <option timestep="0.001" gravity="0 0 0"/>
  <visual><global offwidth="640" offheight="480"/></visual>
  <default><joint damping="1"/><position kp="50"/><geom contype="0" conaffinity="0"/></default>
  <worldbody>
    <light pos="0 0 2"/>
    <geom type="plane" size="1 1 .1" rgba=".4 .5 .5 1"/>
    <body name="phantom" pos=".2 0 .05">
      <geom type="sphere" size=".03" rgba=".9 .9 .9 1"/>
      <site name="entry" pos="0 0 .03" size=".003" rgba="1 0 0 1"/>
    </body>
    <camera name="side_camera" pos=".2 -.28 .16" xyaxes="1 0 0 0 .3 1"/>
    <camera name="front_camera" pos=".48 0 .16" xyaxes="0 1 0 -.3 0 1"/>
    <body pos="0 0 .1"><joint name="j1" axis="0 0 1"/><geom type="capsule" fromto="0 0 0 0 0 .1" size=".02"/>
      <body pos="0 0 .1"><joint name="j2" axis="0 1 0"/><geom type="capsule" fromto="0 0 0 .1 0 .1" size=".02"/>
        <body pos=".1 0 .1"><joint name="j3" axis="0 1 0"/><geom type="capsule" fromto="0 0 0 .1 0 0" size=".015"/>
          <body pos=".1 0 0"><joint name="j4" axis="1 0 0"/><geom type="sphere" size=".015"/>
            <body><joint name="j5" axis="0 1 0"/><geom type="sphere" size=".015"/>
              <body><joint name="j6" axis="0 0 1"/>
                <geom type="capsule" fromto="0 0 0 0 0 -.12" size=".004" rgba="1 .5 0 1"/>
                <camera name="tool_camera" pos=".05 0 -.02" xyaxes="0 1 0 -1 0 0"/>
                <site name="tip" pos="0 0 -.12" size=".003"/>
    </body></body></body></body></body></body>
  </worldbody>
  <actuator>
    <position joint="j1"/><position joint="j2"/><position joint="j3"/>
    <position joint="j4"/><position joint="j5"/><position joint="j6"/>
  </actuator>
</mujoco>
"""


class MyInsertion:
    units, hz, looking = ["m"] * 3 + ["rad"] * 3, 14.9, True  # units: compared with the policy's

    def __init__(self):
        self.model = mujoco.MjModel.from_xml_string(MODEL)  # or from_xml_path("scenes/meca500_eye.xml")
        self.data = mujoco.MjData(self.model)
        self.renderer = mujoco.Renderer(self.model, height=120, width=160)

    def reset(self, seed):
        rng = np.random.default_rng([seed, 1, 4711])  # scenes that no recording shows
        mujoco.mj_resetData(self.model, self.data)
        self.model.body("phantom").pos[:2] = [0.2, 0] + rng.uniform(-0.03, 0.03, 2)
        self.data.qpos[:6] = self.data.ctrl[:6] = rng.uniform(-0.1, 0.1, 6)
        mujoco.mj_forward(self.model, self.data)
        self.frame, self.target, self.ended = 0, self.pose(), dict(success=False)
        return self.observe()

    def pose(self):
        """-> x, y, z of the tip in m, roll, pitch, yaw in rad, as recorded"""
        r = self.data.site("tip").xmat.reshape(3, 3)
        turned = [np.arctan2(r[2, 1], r[2, 2]), -np.arcsin(r[2, 0]), np.arctan2(r[1, 0], r[0, 0])]
        return np.r_[self.data.site("tip").xpos, turned]

    def observe(self):
        images = {}
        for k, camera in enumerate(["front_camera", "side_camera", "tool_camera"] if self.looking else []):
            self.renderer.update_scene(self.data, camera=camera)
            images[f"camera{k + 1}"] = self.renderer.render()  # (h, w, 3) uint8 RGB, as recorded
        return dict(images=images, state=self.pose().astype(np.float32), instruction=None)

    def step(self, action):
        self.target += np.clip(action, -0.02, 0.02)  # from the last target, not from where the arm is
        jacobian = np.zeros((6, self.model.nv))
        for _ in range(67):  # physics steps of 1 ms in a frame
            mujoco.mj_jacSite(self.model, self.data, jacobian[:3], jacobian[3:], self.data.site("tip").id)
            self.data.ctrl[:6] = self.data.qpos[:6] + np.linalg.pinv(jacobian) @ (self.target - self.pose())
            mujoco.mj_step(self.model, self.data)
        tip, self.frame = self.data.site("tip").xpos - self.data.site("entry").xpos, self.frame + 1
        aside = 1000 * np.hypot(*tip[:2])
        self.ended = dict(success=bool(tip[2] < -0.006 and aside < 3), aside_mm=float(aside))
        return self.observe(), self.ended["success"] or self.frame == 80

    def success(self):
        return self.ended

    def expert(self):
        way = self.data.site("entry").xpos - self.target[:3]
        way[2] += -0.012 if np.hypot(*way[:2]) < 0.002 else 0.02
        return np.r_[np.clip(way, -0.005, 0.005), np.clip(-self.target[3:], -0.02, 0.02)]


def jpeg(picture):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=95)
    return np.frombuffer(file.getvalue(), np.uint8)


def record(scene, seed, path):
    """One episode of the expert -> an HDF5 file as the guides' recorder writes it."""
    observation, done, frames = scene.reset(seed), False, []
    while not done:
        frames.append((observation, scene.data.qpos[:6].copy()))
        observation, done = scene.step(scene.expert())
    with h5py.File(path, "w") as f:
        f["observations/ee_pose"] = np.array([o["state"] for o, _ in frames])
        f["observations/qpos"] = np.array([q for _, q in frames], np.float32)
        f["action"] = np.array([q for _, q in frames[1:]] + [scene.data.qpos[:6]], np.float32)
        f["timestamp"] = np.arange(len(frames)) / scene.hz
        for k, camera in enumerate(("front_camera", "side_camera", "tool_camera")):
            shape = f"observations/images/{camera}", len(frames), h5py.vlen_dtype(np.uint8)
            pictures = f.create_dataset(*shape)
            for i, (o, _) in enumerate(frames):
                pictures[i] = jpeg(o["images"][f"camera{k + 1}"])
    print(f"{path}  {len(frames)} frames  {scene.success()}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=120)
    parser.add_argument("--out", default="demo/mujoco")
    args = parser.parse_args()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    scene = MyInsertion()
    for k in range(args.episodes):
        record(scene, 10_000 + k, f"{args.out}/episode_{k:04d}.h5")
