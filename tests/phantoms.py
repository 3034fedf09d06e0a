"""Phantom chest CTs with planted findings, for the demo and the tests; needs NumPy only.

    python tests/phantoms.py OUT_DIR --train 160 --val 48 --test 64 --seed 0

writes one NPZ per scan (`image`: int16 Hounsfield units, (1, D, H, W), orientation SPL: slices feet to head, rows front
to back, columns patient's right to left) and `phantoms.csv`. A phantom is drawn in millimetres on a 300 x 360 x 360 mm
field of view, whatever its shape in voxels: body, ribs, lungs with vessels, mediastinum, heart, aorta, airways, upper
abdomen, each of varied size and place. Then every finding asked for is planted and its mask kept. These are drawings of
findings, good for checking that a training run learns and looks in the right place; they say nothing about patients.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

CT_RATE_LABELS = (
    "Medical material", "Arterial wall calcification", "Cardiomegaly", "Pericardial effusion",
    "Coronary artery wall calcification", "Hiatal hernia", "Lymphadenopathy", "Emphysema", "Atelectasis",
    "Lung nodule", "Lung opacity", "Pulmonary fibrotic sequela", "Pleural effusion", "Mosaic attenuation pattern",
    "Peribronchial thickening", "Consolidation", "Bronchiectasis", "Interlobular septal thickening",
)  # fmt: skip
SHAPE = (24, 96, 96)
FIELD_OF_VIEW = (300.0, 360.0, 360.0)  # mm along D, H, W
PREVALENCE = 0.4


@dataclass
class Body:
    """One phantom under construction; z, y, x are mm from the centre towards head, back and patient's left."""

    hu: np.ndarray  # float32 (D, H, W)
    z: np.ndarray
    y: np.ndarray
    x: np.ndarray
    lungs: np.ndarray | None = None  # where lung was drawn, findings included
    air: np.ndarray | None = None  # lung that no finding has filled yet
    heart_r2: np.ndarray | None = None  # squared distance from the heart's centre, in units of its half axes
    heart: dict[str, float] = field(default_factory=dict)
    marks: dict[str, float] = field(default_factory=dict)  # places (mm) that planters need

    def ball(self, z: float, y: float, x: float, rz: float, ry: float, rx: float) -> np.ndarray:
        """Ellipsoid, never empty: it holds at least the voxel nearest to its centre."""
        inside = ((self.z - z) / rz) ** 2 + ((self.y - y) / ry) ** 2 + ((self.x - x) / rx) ** 2 < 1
        inside[tuple(int(np.abs(axis - at).argmin()) for axis, at in ((self.z, z), (self.y, y), (self.x, x)))] = True
        return inside

    def line(self, start: Sequence[float], end: Sequence[float], steps: int = 64) -> np.ndarray:
        """Indices (3, steps) of the voxels on a straight line between two points given as (z, y, x) mm."""
        points = np.linspace(np.asarray(start), np.asarray(end), steps).T  # (3, steps)
        first, last = (np.array([[axis.flat[end]] for axis in (self.z, self.y, self.x)]) for end in (0, -1))
        last_index = np.array(self.hu.shape)[:, None] - 1
        return np.clip(np.rint((points - first) / (last - first) * last_index).astype(int), 0, last_index)

    def fill(self, mask: np.ndarray, hu: float) -> np.ndarray:
        """Set the HU of a region; what lay there is air no more."""
        self.hu[mask] = hu
        if self.air is not None:
            self.air &= ~mask
        return mask

    def lung_point(self, rng: np.random.Generator, low: float = -150, high: float = 150) -> tuple[float, float, float]:
        """Random point (z, y, x) in aerated lung, two voxels from its border where there is room, z within limits."""
        inner = self.air.copy()
        for axis, step in ((1, 2), (1, -2), (2, 2), (2, -2)):
            inner &= np.roll(self.air, step, axis)
        level = (self.z >= low) & (self.z <= high)
        for region in (inner & level, inner, self.air, self.lungs, np.ones_like(inner)):
            if region.any():
                break
        d, h, w = np.unravel_index(rng.choice(np.flatnonzero(region)), region.shape)
        return float(self.z[d, 0, 0]), float(self.y[0, h, 0]), float(self.x[0, 0, w])


def smooth(volume: np.ndarray) -> np.ndarray:
    """Blur rows and columns with (1, 2, 1) / 4, the partial volume effect of a scanner."""
    for axis in (1, 2):
        volume = 0.5 * volume + 0.25 * (np.roll(volume, 1, axis) + np.roll(volume, -1, axis))
    return volume


def coarse_noise(rng: np.random.Generator, shape: tuple[int, int, int], block: int) -> np.ndarray:
    """Unit noise with a grain of about `block` voxels in-plane."""
    d, h, w = shape
    noise = rng.standard_normal((d, -(-h // block), -(-w // block)), dtype=np.float32)
    return smooth(noise.repeat(block, 1).repeat(block, 2)[:, :h, :w])


def draw_body(rng: np.random.Generator, shape: tuple[int, int, int], heart_scale: float) -> Body:
    """Healthy anatomy: soft tissue, skeleton, lungs, upper abdomen and mediastinum."""
    z, y, x = (
        ((np.arange(n, dtype=np.float32) + 0.5) / n - 0.5).reshape([-1 if i == axis else 1 for i in range(3)]) * mm
        for axis, (n, mm) in enumerate(zip(shape, FIELD_OF_VIEW, strict=True))
    )
    size = rng.uniform(0.9, 1.04)
    z, y, x = (z + rng.uniform(-8, 8)) / size, (y + rng.uniform(-8, 8)) / size, (x + rng.uniform(-8, 8)) / size
    body = Body(np.full(shape, -1000, np.float32), z, y, x)
    fat = rng.uniform(6, 20)
    outline = (x / 158) ** 2 + (y / 112) ** 2  # (1, H, W)
    inner = (x / (158 - fat)) ** 2 + (y / (112 - fat)) ** 2
    body.hu[:] = np.where(outline < 1, np.where(inner < 1, rng.uniform(40, 60), -100), -1000)
    draw_skeleton(rng, body)
    draw_lungs(rng, body)
    draw_mediastinum(rng, body, heart_scale)
    draw_vessels(rng, body)
    return body


def draw_skeleton(rng: np.random.Generator, body: Body) -> None:
    z, y, x = body.z, body.y, body.x
    ring = np.abs(np.sqrt((x / 137) ** 2 + (y / 92) ** 2) - 1) < 0.045
    stripes = np.sin((z + 0.5 * y) * (2 * np.pi / 30) + rng.uniform(0, 6)) > 0.2
    body.hu[ring & stripes] = rng.uniform(250, 450)
    vertebra = ((x / 20) ** 2 + ((y - 72) / 17) ** 2 < 1) & (z < np.inf)
    body.hu[vertebra] = rng.uniform(150, 260)
    body.hu[(np.abs(x) < 4) & (y > 86) & (y < 104) & (z < np.inf)] = 350  # spinous process
    body.hu[(np.abs(x) < 16) & (np.abs(y + 86) < 5) & (z > -60)] = 200  # sternum


def draw_lungs(rng: np.random.Generator, body: Body) -> None:
    """Two lungs over the domes of the diaphragm; liver under the right one, stomach and spleen under the left."""
    z, y, x = body.z, body.y, body.x
    body.lungs = np.zeros(body.hu.shape, bool)
    taper = np.sqrt(np.clip(1 - np.clip((z - 10) / rng.uniform(110, 130), 0, 1) ** 2.5, 1e-4, 1))
    body.marks["dome"] = dome_top = rng.uniform(-80, -58)
    for side, drop, organ in ((-1, 0, rng.uniform(50, 70)), (1, 10, rng.uniform(35, 50))):
        wide, deep = rng.uniform(50, 58), rng.uniform(74, 82)
        r2 = ((x - side * 75) / (wide * taper)) ** 2 + ((y + 2) / (deep * taper)) ** 2
        dome = dome_top - drop + 15 - 50 * np.minimum(r2, 1)
        body.lungs |= (r2 < 1) & (z > dome)
        body.hu[(r2 < 1.05) & (z <= dome)] = organ
    body.hu[(np.abs(x) < 60) & (np.abs(y + 5) < 60) & (z < dome_top - 20)] = rng.uniform(40, 60)
    body.hu[body.ball(dome_top - 45, -35, rng.uniform(45, 65), 25, 16, 24)] = -950  # gas in the stomach
    texture = coarse_noise(rng, body.hu.shape, 4) * 25 + 0.3 * y + rng.uniform(-880, -840)
    body.hu[body.lungs] = texture[body.lungs]
    body.air = body.lungs.copy()


def draw_mediastinum(rng: np.random.Generator, body: Body, heart_scale: float) -> None:
    z, y, x = body.z, body.y, body.x
    dome, blood = body.marks["dome"], rng.uniform(38, 55)
    centre = ((x / 36) ** 2 + ((y - 2) / 62) ** 2 < 1) & (z > dome - 15)
    body.fill(centre & (y < 58), -80)
    cz, cy, cx = dome + rng.uniform(30, 38) * heart_scale**0.5, rng.uniform(-26, -16), rng.uniform(16, 26)
    tilt = np.deg2rad(rng.uniform(20, 45))
    long = (x - cx) * np.cos(tilt) - (y - cy) * np.sin(tilt)
    short = (x - cx) * np.sin(tilt) + (y - cy) * np.cos(tilt)
    half = {"long": 50 * heart_scale, "short": 38 * heart_scale, "up": 42 * heart_scale}
    body.heart_r2 = (long / half["long"]) ** 2 + (short / half["short"]) ** 2 + ((z - cz) / half["up"]) ** 2
    body.heart = {"z": cz, "y": cy, "x": cx, "tilt": tilt, **half}
    thorax = (z > dome - 15) & ((x / 130) ** 2 + (y / 86) ** 2 < 1)
    body.fill((body.heart_r2 < 1.2) & thorax, -80)  # epicardial fat
    body.fill(body.heart_r2 < 1, blood)
    arch, radius = rng.uniform(48, 66), rng.uniform(11, 14)
    ay, ax = rng.uniform(44, 50), rng.uniform(20, 26)
    body.marks.update(arch=arch, aorta_y=ay, aorta_x=ax, aorta_r=radius)
    body.fill(((x - ax) ** 2 + (y - ay) ** 2 < radius**2) & (z < arch), blood)  # descending aorta
    body.fill(((x + 6) ** 2 + (y + 18) ** 2 < 15**2) & (z > cz) & (z < arch), blood)  # ascending aorta
    body.fill(((x + 27) ** 2 + (y + 10) ** 2 < 8**2) & (z > cz), blood)  # superior vena cava
    along = np.clip((y + 18) / (ay + 18), 0, 1)
    bow = np.hypot(x - (-6 + along * (ax + 6)), (z - arch) * 0.9) < radius
    body.fill(bow & (y > -18 - radius) & (y < ay + radius), blood)
    body.fill((x - 4) ** 2 + (y - 44) ** 2 + 0 * z < 6**2, 35)  # oesophagus
    body.fill((x**2 + (y - 14) ** 2 < 9**2) & (z > 22), -1000)  # trachea
    fall = 22 - z
    for side in (-1, 1):  # main bronchi
        body.fill(((x - side * (6 + fall)) ** 2 + (y - 14) ** 2 < 6**2) & (fall > 0) & (fall < 32), -1000)


def draw_vessels(rng: np.random.Generator, body: Body, count: int = 45) -> None:
    """Straight branches from each hilum into its lung, thick at the root: what a nodule must be told from.

    They are thinner than a voxel, which shows them at the mean of blood and air, as on a real CT.
    """
    for side in (-1, 1):
        targets = np.flatnonzero(body.air & (body.x * side > 0))
        for flat in rng.choice(targets, count) if targets.size else ():
            d, h, w = np.unravel_index(flat, body.air.shape)
            end = (body.z[d, 0, 0], body.y[0, h, 0], body.x[0, 0, w])
            index = body.line((5 + rng.normal(0, 8), 8 + rng.normal(0, 8), side * 34), end, 40)
            root = index[:, :12]
            thick = np.hstack([root, np.add(root, [[0], [1], [0]]), np.add(root, [[0], [0], [1]])])
            for part, hu in ((index, rng.uniform(-650, -400)), (thick, rng.uniform(-450, -200))):
                inside = np.minimum(part, np.array(body.air.shape)[:, None] - 1)
                body.hu[tuple(inside[:, body.air[tuple(inside)]])] = hu


# Planters change `body` and return the mask of what they planted.


def plant_cardiomegaly(rng: np.random.Generator, body: Body) -> np.ndarray:
    return body.heart_r2 < 1  # draw_body already drew the heart large


def plant_pericardial_effusion(rng: np.random.Generator, body: Body) -> np.ndarray:
    outer = (1 + rng.uniform(12, 18) / body.heart["short"]) ** 2
    shell = (body.heart_r2 >= 1.1) & (body.heart_r2 < outer) & (body.lungs | (body.hu < 0))
    shell &= ((body.x / 125) ** 2 + (body.y / 80) ** 2 < 1) & (body.hu > -990)
    return body.fill(shell, rng.uniform(5, 18))


def plant_hiatal_hernia(rng: np.random.Generator, body: Body) -> np.ndarray:
    z, y, x = body.marks["dome"] + rng.uniform(8, 25), rng.uniform(36, 44), rng.uniform(-6, 8)
    r, aorta = rng.uniform(21, 28), body.marks
    keep = (np.hypot(body.y - 72, body.x) > 20) & (
        np.hypot(body.y - aorta["aorta_y"], body.x - aorta["aorta_x"]) > aorta["aorta_r"]
    )
    sac = body.ball(z, y, x, r, r, r) & keep
    body.fill(sac, rng.uniform(20, 45))
    body.fill(body.ball(z, y, x, 0.8 * r, 0.75 * r, 0.75 * r) & keep & (body.y < y), -920)  # gas rises to the front
    return sac


def plant_pleural_effusion(rng: np.random.Generator, body: Body) -> np.ndarray:
    level = rng.uniform(18, 48) + rng.uniform(0.25, 0.4) * (body.z - body.marks["dome"])
    fluid = body.air & (body.y > level)
    sides = rng.choice(["right", "left", "both"])
    if sides != "both":
        fluid &= body.x < 0 if sides == "right" else body.x > 0
    return body.fill(fluid, rng.uniform(5, 20))


def plant_consolidation(rng: np.random.Generator, body: Body) -> np.ndarray:
    z, y, x = body.lung_point(rng)
    area = body.ball(z, y, x, *rng.uniform(30, 44, 3)) & body.air
    filled = area & (coarse_noise(rng, body.hu.shape, 2) < 0.9)  # the rest are air bronchograms
    return body.fill(filled, rng.uniform(25, 50))


def plant_lung_opacity(rng: np.random.Generator, body: Body) -> np.ndarray:
    """Ground glass: denser lung in which vessels are still seen."""
    area = np.zeros(body.hu.shape, bool)
    for _ in range(rng.integers(2, 5)):
        area |= body.ball(*body.lung_point(rng), *rng.uniform(28, 42, 3))
    area &= body.air
    haze = rng.uniform(300, 420) + 40 * coarse_noise(rng, body.hu.shape, 2)
    body.hu[area] = np.minimum(body.hu + haze, -200)[area]
    return area


def plant_emphysema(rng: np.random.Generator, body: Body) -> np.ndarray:
    """Centrilobular holes, more of them towards the apex, in lungs that are darker as a whole."""
    grain = coarse_noise(rng, body.hu.shape, 3) + np.clip(body.z / 120, -0.5, 0.5)
    holes = body.air & (grain > rng.uniform(0.5, 0.8))
    body.hu[body.air] -= 25
    body.hu[holes] = rng.uniform(-995, -975)
    return holes


def plant_atelectasis(rng: np.random.Generator, body: Body) -> np.ndarray:
    """One to three plates of collapsed lung near the base, denser than consolidation: collapsed lung enhances more."""
    plates = np.zeros(body.hu.shape, bool)
    for _ in range(rng.integers(1, 4)):
        z, y, x = body.lung_point(rng, -110, 0)
        angle = rng.uniform(-0.9, 0.9)
        across = (body.y - y) * np.cos(angle) + (body.x - x) * np.sin(angle) + 0.3 * (body.z - z)
        plates |= (np.abs(across) < rng.uniform(5.5, 7.5)) & body.ball(z, y, x, 30, 70, 70)
    return body.fill(plates & body.air, rng.uniform(80, 115))


def plant_lung_nodule(rng: np.random.Generator, body: Body) -> np.ndarray:
    """One to three round nodules of 20 to 30 mm, as dense as granulomas that begin to calcify."""
    nodules = np.zeros(body.hu.shape, bool)
    for _ in range(rng.integers(1, 4)):
        r = rng.uniform(10, 15)
        nodules |= body.ball(*body.lung_point(rng), r + 2, r, r) & body.lungs
    return body.fill(nodules, rng.uniform(120, 220))


def plant_coronary_calcification(rng: np.random.Generator, body: Body) -> np.ndarray:
    """Two to four deposits where the coronary arteries run: on the heart's front and left, above its middle."""
    heart, spots = body.heart, np.zeros(body.hu.shape, bool)
    for _ in range(rng.integers(2, 5)):
        up, turn = rng.uniform(0.1, 0.6), np.deg2rad(rng.uniform(-110, 10))
        level = np.sqrt(1 - up**2) * 1.03
        long, short = level * heart["long"] * np.cos(turn), level * heart["short"] * np.sin(turn)
        x = heart["x"] + long * np.cos(heart["tilt"]) + short * np.sin(heart["tilt"])
        y = heart["y"] - long * np.sin(heart["tilt"]) + short * np.cos(heart["tilt"])
        spots |= body.ball(heart["z"] + up * heart["up"], y, x, 8, *rng.uniform(3, 5.5, 2))
    return body.fill(spots, rng.uniform(500, 1100))


def plant_arterial_calcification(rng: np.random.Generator, body: Body) -> np.ndarray:
    """Two to four arcs in the wall of the descending aorta."""
    marks, plaques = body.marks, np.zeros(body.hu.shape, bool)
    dy, dx = body.y - marks["aorta_y"], body.x - marks["aorta_x"]
    wall = np.abs(np.hypot(dy, dx) - marks["aorta_r"] + 1) < 2.6  # (1, H, W)
    for _ in range(rng.integers(2, 5)):
        z, turn = rng.uniform(-100, marks["arch"]), rng.uniform(-np.pi, np.pi)
        arc = np.cos(np.arctan2(dy, dx) - turn) > np.cos(np.deg2rad(rng.uniform(35, 65)))
        plaques |= wall & arc & (np.abs(body.z - z) < rng.uniform(9, 18))
        plaques |= body.ball(z, marks["aorta_y"] + marks["aorta_r"] * np.sin(turn),
                             marks["aorta_x"] + marks["aorta_r"] * np.cos(turn), 2, 2, 2)  # fmt: skip
    return body.fill(plaques, rng.uniform(500, 1100))


def plant_medical_material(rng: np.random.Generator, body: Body) -> np.ndarray:
    """A pacemaker with its lead, a central venous catheter, or the wires of a closed sternum."""
    metal, heart = np.zeros(body.hu.shape, bool), body.heart
    kind = rng.choice(["pacemaker", "catheter", "wires"])
    if kind == "wires":
        for z in np.arange(-40, 90, 22) + rng.uniform(-8, 8):
            metal |= body.ball(z, -88 + rng.uniform(-3, 3), rng.uniform(-8, 8), 8, 3, rng.uniform(5, 10))
        return body.fill(metal, 3000)
    shoulder = (100.0, -45.0, -40.0)
    if kind == "pacemaker":
        shoulder = (80.0, -78.0, 85.0)
        metal |= body.ball(*shoulder, 22, 6, 22)
    route = [shoulder, (70, -10, -27), (heart["z"] + 0.6 * heart["up"], -10, -27)]
    if kind == "pacemaker":
        route.append((heart["z"] - 0.3 * heart["up"], heart["y"] - 8, heart["x"] + 12))
    for start, end in itertools.pairwise(route):
        metal[tuple(body.line(start, end, 200))] = True
    metal |= np.roll(metal, 1, axis=2)  # two voxels wide: metal blooms
    return body.fill(metal, 3000 if kind == "pacemaker" else 1500)


# Planting order: what fills lung comes before what must stay visible in it. Soft tissue is blurred, metal and
# calcium are not: they are drawn at the size they have on the image.
SOFT: dict[str, Callable[[np.random.Generator, Body], np.ndarray]] = {
    "Cardiomegaly": plant_cardiomegaly,
    "Pericardial effusion": plant_pericardial_effusion,
    "Hiatal hernia": plant_hiatal_hernia,
    "Pleural effusion": plant_pleural_effusion,
    "Emphysema": plant_emphysema,
    "Consolidation": plant_consolidation,
    "Lung opacity": plant_lung_opacity,
    "Atelectasis": plant_atelectasis,
    "Lung nodule": plant_lung_nodule,
}
HARD: dict[str, Callable[[np.random.Generator, Body], np.ndarray]] = {
    "Coronary artery wall calcification": plant_coronary_calcification,
    "Arterial wall calcification": plant_arterial_calcification,
    "Medical material": plant_medical_material,
}
FINDINGS = tuple(label for label in CT_RATE_LABELS if label in SOFT or label in HARD)


def make_phantom(
    rng: np.random.Generator, findings: Iterable[str], shape: tuple[int, int, int] = SHAPE
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Draw one phantom with exactly these findings.

    Returns the volume, int16 HU (D, H, W) in SPL, and for each finding its mask, bool (D, H, W).
    Raises ValueError for a finding that cannot be planted.
    """
    wanted = set(findings)
    if unknown := wanted - set(FINDINGS):
        raise ValueError(f"cannot plant {sorted(unknown)}; choose from {list(FINDINGS)}")
    heart_scale = rng.uniform(1.32, 1.5) if "Cardiomegaly" in wanted else rng.uniform(0.85, 1.08)
    body = draw_body(rng, tuple(shape), heart_scale)
    masks = {label: plant(rng, body) for label, plant in SOFT.items() if label in wanted}
    body.hu = smooth(body.hu)
    masks |= {label: plant(rng, body) for label, plant in HARD.items() if label in wanted}
    noise = rng.standard_normal(body.hu.shape, dtype=np.float32) * rng.uniform(8, 20)
    return np.clip(np.rint(body.hu + noise), -1024, 3071).astype(np.int16), masks


def write_dataset(
    folder: str | Path,
    n_train: int,
    n_val: int,
    n_test: int,
    seed: int = 0,
    shape: tuple[int, int, int] = SHAPE,
    findings: Sequence[str] = FINDINGS,
    save_masks: bool = False,
    all_columns: bool = False,
    prevalence: float = PREVALENCE,
) -> Path:
    """Write phantoms and their CSV; each finding is present with probability `prevalence`, whatever the others are.

    The CSV has one 0/1 column per finding in `findings`; `all_columns` adds the rest of the 18 CT-RATE labels with
    empty cells (= unknown: nobody planted or looked for them). `save_masks` adds `{series_id}_mask.npz` beside each
    scan, with one bool array (D, H, W) per finding in `findings`, keyed by label and all False where absent.
    The same arguments give the same bytes; scan i does not depend on how many scans there are. Returns the CSV's path.
    """
    folder = Path(folder)
    (folder / "volumes").mkdir(parents=True, exist_ok=True)
    planted = [label for label in CT_RATE_LABELS if label in set(findings)]
    columns = CT_RATE_LABELS if all_columns else planted
    rows = []
    for number, split in enumerate(["train"] * n_train + ["val"] * n_val + ["test"] * n_test, start=1):
        rng = np.random.default_rng([seed, number])
        present = [label for label in planted if rng.random() < prevalence]
        volume, masks = make_phantom(rng, present, shape)
        series_id = f"phantom_{number}_a_1"
        np.savez(folder / "volumes" / f"{series_id}.npz", image=volume[None])
        if save_masks:
            full = {label: masks.get(label, np.zeros(shape, bool)) for label in planted}
            np.savez_compressed(folder / "volumes" / f"{series_id}_mask.npz", **full)
        cells = [("01"[label in present] if label in planted else "") for label in columns]
        rows.append([series_id, split, f"volumes/{series_id}.npz", *cells])
    path = folder / "phantoms.csv"
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([["series_id", "split", "img_path", *columns], *rows])
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description="Write phantom chest CTs with planted findings, and their CSV.")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--train", type=int, default=160, help="scans of split train [160]")
    parser.add_argument("--val", type=int, default=48, help="scans of split val [48]")
    parser.add_argument("--test", type=int, default=64, help="scans of split test [64]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prevalence", type=float, default=PREVALENCE, help="share of scans with each finding [0.4]")
    parser.add_argument("--shape", type=int, nargs=3, default=SHAPE, metavar=("D", "H", "W"))
    parser.add_argument("--save-masks", action="store_true", help="also write the mask of each finding")
    parser.add_argument("--all-columns", action="store_true", help="18 columns; never-planted findings stay empty")
    args = parser.parse_args()
    path = write_dataset(
        args.out_dir, args.train, args.val, args.test, args.seed, tuple(args.shape),
        save_masks=args.save_masks, all_columns=args.all_columns, prevalence=args.prevalence,
    )  # fmt: skip
    header = path.read_text(encoding="utf-8").splitlines()[0]
    (args.out_dir / "findings.txt").write_text("\n".join(header.split(",")[3:]) + "\n", encoding="utf-8")  # @FILE
    print(path)


if __name__ == "__main__":
    main()
