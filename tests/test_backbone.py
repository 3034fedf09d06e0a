"""Room 5: every tensor comes from the file, and the features are those of the code that wrote it."""

import argparse
import json
import logging
import os
import re
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import finetune_siglip as fs

TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
}
PREFIXES = (
    "",
    "module.",
    "_orig_mod.",
    "visual.",
    "vision_model.",
    "model.encode_image.i3_resnet.",
    "module.module.visual.",
    "_orig_mod.module.model.visual.trunk.",
    "student.backbone.",
    "a.b.c.d.e.f.",
)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def tiny_tower(**settings):
    from transformers import SiglipVisionConfig, SiglipVisionModel

    return SiglipVisionModel(SiglipVisionConfig(**{**TINY, **settings})).eval()


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


def saved(path, content):
    torch.save(content, path)
    return path


def difference(backbone, images, reference):
    with torch.no_grad():
        return float((backbone.eval()(images) - reference).abs().max())


@pytest.fixture(scope="module")
def tower():
    torch.manual_seed(0)
    model = tiny_tower()
    for parameter in model.parameters():  # biases and norms off their neutral start, or a mix-up could hide
        nn.init.normal_(parameter, std=0.2)
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        return model, images, model(pixel_values=images * 2 - 1).pooler_output


# Features equal those of the code that wrote the file


def test_hugging_face_folder_gives_the_features_of_transformers(tower, tmp_path):
    model, images, reference = tower
    model.save_pretrained(tmp_path)
    assert difference(fs.load_backbone(tmp_path), images, reference) <= 1e-5


def test_full_model_with_older_names_beside_its_config_uses_the_vision_tower(tmp_path, caplog):
    from transformers import SiglipConfig, SiglipModel

    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = SiglipModel(SiglipConfig(vision_config=TINY, text_config=text | {"vocab_size": 40})).eval()
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        reference = model.vision_model(pixel_values=images * 2 - 1).pooler_output
    with caplog.at_level(logging.INFO):
        backbone = fs.load_backbone(tmp_path / "pytorch_model.bin")
    assert difference(backbone, images, reference) <= 1e-5
    assert "48 tensors matched, 0 missing, 24 unexpected" in caplog.text
    assert "text_model" in caplog.text


def test_sharded_safetensors_are_read_through_their_index(tower, tmp_path):
    model, images, reference = tower
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert difference(fs.load_backbone(tmp_path), images, reference) <= 1e-5


@pytest.mark.parametrize("prefix", PREFIXES)
def test_siglip_under_any_prefix_and_container(tower, tmp_path, prefix):
    model, images, reference = tower
    content = {"epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}
    content["state_dict"] = {"model": prefixed(model.state_dict(), prefix)}
    path = saved(tmp_path / "x.pth", content)
    assert difference(fs.load_backbone(path, heads=2), images, reference) <= 1e-5


def test_wrappers_inside_the_names_are_taken_off(tower, tmp_path):
    model, images, reference = tower
    state = {k.replace("layers.1.", "layers.1._orig_mod."): v for k, v in model.state_dict().items()}
    path = saved(tmp_path / "x.pt", prefixed(state, "visual."))
    assert difference(fs.load_backbone(path, heads=2), images, reference) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_becomes_float32(tower, tmp_path, dtype):
    model, _, _ = tower
    state = {k: v.to(dtype) for k, v in model.state_dict().items()}
    save_file(state, tmp_path / "x.safetensors")
    backbone = fs.load_backbone(tmp_path / "x.safetensors", heads=2)
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}
    for name, tensor in state.items():
        assert torch.equal(backbone.state_dict()[f"net.{name}"], tensor.float())


def test_averaged_weights_are_preferred_and_the_choice_is_logged(tower, tmp_path, caplog):
    model, images, reference = tower
    noise = {k: torch.zeros_like(v) for k, v in model.state_dict().items()}
    path = saved(tmp_path / "x.pt", {"model": noise, "model_ema": model.state_dict()})
    with caplog.at_level(logging.INFO):
        assert difference(fs.load_backbone(path, heads=2), images, reference) <= 1e-5
    assert "also there: 'model.'" in caplog.text


def vlm_tower(kind):
    """The vision tower of a vision language model, as its whole file holds it, and its features."""
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
    )

    text = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 40,
    }
    text |= {"num_key_value_heads": 1, "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = TINY | {"vision_use_head": False}
    if kind == "gemma3":
        config: object = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
        model = Gemma3ForConditionalGeneration(config).eval()
        return model, model.model.vision_tower
    if kind == "paligemma":
        config = PaliGemmaConfig(text_config=text | {"model_type": "gemma"}, vision_config=vision, projection_dim=32)
        model = PaliGemmaForConditionalGeneration(config).eval()
        return model, model.model.vision_tower
    config = Idefics3Config(text_config=text | {"model_type": "llama"}, vision_config=TINY, scale_factor=2)
    model = Idefics3ForConditionalGeneration(config).eval()
    return model, model.model.vision_model


@pytest.mark.parametrize("kind", ["gemma3", "paligemma", "idefics3"])
def test_the_headless_tower_inside_a_vision_language_model_gives_the_mean_of_its_tokens(tmp_path, kind, caplog):
    model, tower = vlm_tower(kind)
    model.save_pretrained(tmp_path)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        reference = tower(images * 2 - 1).last_hidden_state.mean(1)
    with caplog.at_level(logging.INFO):
        assert difference(fs.load_backbone(tmp_path), images, reference) <= 1e-5
    assert "no pooling head" in caplog.text


@pytest.mark.parametrize("size", [32, 48, 24])
def test_siglip2_naflex_equals_transformers_at_any_square_size(tmp_path, size):
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    settings = {k: v for k, v in TINY.items() if k != "image_size"}
    model = Siglip2VisionModel(Siglip2VisionConfig(**settings, num_patches=16)).eval()
    model.save_pretrained(tmp_path)
    nn.init.normal_(model.embeddings.position_embedding.weight, std=0.5)
    model.save_pretrained(tmp_path)
    images, side = torch.rand(2, 3, size, size), size // 8
    patches = (images * 2 - 1).unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).reshape(2, side**2, -1)
    shapes, mask = torch.tensor([[side, side]] * 2), torch.ones(2, side**2, dtype=torch.long)
    with torch.no_grad():
        reference = model(pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=shapes).pooler_output
    assert difference(fs.load_backbone(tmp_path, size), images, reference) <= 1e-5


def timm_tower(**settings):
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        **{"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1, "mlp_ratio": 1.5} | settings,
        **{"class_token": False, "global_pool": "map", "num_classes": 0},
    ).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("prefix", ["", "visual.trunk.", "module.visual.trunk."])
def test_timm_tower_gives_timms_features(tmp_path, prefix):
    model, images = timm_tower(), torch.rand(2, 3, 32, 32)
    state = prefixed(model.state_dict(), prefix) | {"text.transformer.x": torch.ones(1), "logit_scale": torch.ones(())}
    path = saved(tmp_path / "open_clip_pytorch_model.bin", state)
    with torch.no_grad():
        reference = model(images * 2 - 1)
    assert difference(fs.load_backbone(path), images, reference) <= 1e-4


def timm_folder(folder, name, **settings):
    """A model of timm with random weights in a folder as it uploads them to the hub."""
    import timm
    from timm.models._hub import save_config_for_hf

    model = timm.create_model(name, num_classes=0, **settings).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    save_file(model.state_dict(), folder / "model.safetensors")
    save_config_for_hf(model, folder / "config.json", model_args=settings)
    return model


SMALL_VIT = {"embed_dim": 64, "depth": 2, "num_heads": 2}
TIMM_SIGLIP = ["vit_base_patch16_siglip_gap_224", "vit_so400m_patch14_siglip_378", "naflexvit_base_patch16_siglip"]


@pytest.mark.parametrize("name", TIMM_SIGLIP)
def test_every_siglip_of_timm_gives_timms_features(tmp_path, name):
    model = timm_folder(tmp_path, name, **SMALL_VIT)
    backbone = fs.load_backbone(tmp_path, heads=2)
    size = backbone.config["image_size"]
    images = torch.rand(1, 3, size, size)
    with torch.no_grad():
        reference = model(images * 2 - 1)
    assert (backbone.family, size) == ("siglip", {"224": 224, "378": 378}.get(name[-3:], 256))
    assert difference(backbone, images, reference) <= 1e-4


def test_a_timm_vit_without_a_table_of_positions_needs_the_file_that_names_it(tmp_path):
    model = timm_folder(tmp_path, "beit_base_patch16_224", **SMALL_VIT)
    images = torch.rand(1, 3, *model.pretrained_cfg["input_size"][1:])
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        reference = model((images - mean) / std)
    assert difference(fs.load_backbone(tmp_path), images, reference) <= 1e-4
    (tmp_path / "config.json").unlink()
    with pytest.raises(fs.BadInput, match=r"pos_embed is missing: .* without the config\.json"):
        fs.load_backbone(tmp_path)


VITS = {
    "vit_base_patch14_reg4_dinov2": {"img_size": 28},
    "vit_giant_patch14_dinov2": {"img_size": 28, "mlp_ratio": 4.0},
    "vit_base_patch16_224": {"img_size": 32},
    "vit_large_patch14_dinov2": {"img_size": 32, "patch_size": 16, "in_chans": 1},  # DALE-CT's
    "vit_base_patch16_dinov3": {"img_size": 32},
    "eva02_base_patch14_224": {"img_size": 28},
}


@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize("name", VITS)
def test_a_vit_gives_timms_features_with_its_description_and_without(tmp_path, name, described, caplog):
    model = timm_folder(tmp_path, name, **SMALL_VIT | VITS[name])
    grey, size = "in_chans" in VITS[name], VITS[name]["img_size"]
    stated = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    mean, std = (torch.tensor(stated[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    if not described:
        (tmp_path / "config.json").unlink()
        if "dinov3" in name or "eva" in name:  # shapes alone don't tell these
            with pytest.raises(fs.BadInput, match="pos_embed is missing" if "dinov3" in name else "incomplete"):
                fs.load_backbone(tmp_path, heads=2)
            return
        mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    images = torch.rand(2, 1 if grey else 3, size, size)
    normal = (images - mean) / std
    if grey and described:
        normal = (images - mean.mean()) / std.mean()
    elif grey:  # (HU + 142.39) / 360.97 of HU in -997..888
        normal = (images * 1885 - 997 + 142.39) / 360.97
    with torch.no_grad():
        reference = model(normal)
    with caplog.at_level(logging.INFO):
        backbone = fs.load_backbone(tmp_path, heads=2)
    images = images.expand(-1, 3, -1, -1)
    assert difference(backbone, images, reference) <= 1e-5
    assert ("DALE-CT" in caplog.text) == (grey and not described)
    shares, feature = backbone.evidence(images)
    assert difference(backbone, images, feature(shares)) <= 1e-5
    assert backbone.windows == (
        ((-997.0, 888.0),) * 3 if grey and not described else fs.WINDOW_PRESETS["merlin" if grey else "chest"]
    )
    again = fs.build_backbone(json.loads(json.dumps(backbone.config)))
    again.load_state_dict(backbone.state_dict())
    assert difference(again, images, reference) <= 1e-5
    larger = fs.load_backbone(tmp_path, 2 * size, heads=2)
    assert larger(torch.rand(1, 3, 2 * size, 2 * size)).shape == (1, 64)


@pytest.mark.parametrize(
    ("name", "width", "heads"), [("vit_giant_patch14_dinov2", 1536, 24), ("vit_base_patch16_224", 1152, 18)]
)
def test_a_wide_vit_has_a_head_for_each_64_of_its_width(tmp_path, name, width, heads):
    timm = pytest.importorskip("timm")
    tower = timm.create_model(name, depth=1, img_size=28, patch_size=14, embed_dim=width, num_heads=heads, mlp_ratio=1)
    torch.save(tower.state_dict(), tmp_path / "tower.pt")
    found = fs.read_pretrained(tmp_path / "tower.pt")
    assert (found.config["arguments"]["num_heads"], "assumed" in found.notes[0]) == (heads, True)


def test_containers_that_hold_themselves_or_one_another_many_times_are_read_once(tmp_path):
    content: dict = {"state_dict": tiny_tower().state_dict()}
    content["itself"] = content
    for _ in range(40):
        content = {"a": content, "b": content}
    torch.save(content, tmp_path / "tower.pt")
    assert len(fs.read_pretrained(tmp_path / "tower.pt", heads=2).tensors) == len(tiny_tower().state_dict())


def test_a_siglip_tower_beside_one_of_clip_is_taken(tmp_path):
    state = {f"{prefix}.{name}": t for prefix in ("clip", "siglip") for name, t in tiny_tower().state_dict().items()}
    torch.save(state | {"clip.embeddings.class_embedding": torch.ones(64)}, tmp_path / "both.pt")
    assert fs.read_pretrained(tmp_path / "both.pt", heads=2).prefix == "siglip."


@pytest.mark.parametrize("change", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr, torch.Tensor.cfloat])
def test_tensors_that_no_tower_computes_with_are_refused(tmp_path, change):
    state = {name: change(t) if name.endswith("fc1.weight") else t for name, t in tiny_tower().state_dict().items()}
    torch.save(state, tmp_path / "odd.pt")
    with pytest.raises(fs.BadInput, match="a quantised model, or sparse"):
        fs.load_backbone(tmp_path / "odd.pt", heads=2)


def test_tensors_without_values_are_refused(tmp_path):
    torch.save({name: t.to("meta") for name, t in tiny_tower().state_dict().items()}, tmp_path / "meta.pt")
    with pytest.raises(fs.BadInput, match="empty or not finite"):
        fs.load_backbone(tmp_path / "meta.pt", heads=2)


@pytest.mark.parametrize("content", [{}, {"weight_map": None}, {"weight_map": ["a"]}])
def test_an_index_of_nothing_is_refused(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(fs.BadInput, match="an index of none"):
        fs.read_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["foo/bar..baz", "a--b/c", "a/b.git"])
def test_what_can_be_no_name_of_the_hub_is_refused(name):
    with pytest.raises(fs.BadInput, match="neither here nor a model"):
        fs.read_pretrained(name)


def test_of_a_cached_models_snapshots_the_current_one_is_taken(tmp_path):
    for snapshot in ("abc", "def"):
        tiny_tower().save_pretrained(tmp_path / "snapshots" / snapshot)
    with pytest.raises(fs.BadInput, match="several snapshots"):
        fs.read_pretrained(tmp_path)
    (tmp_path / "refs").mkdir()
    (tmp_path / "refs" / "main").write_text("def")
    assert "def" in fs.read_pretrained(tmp_path).source


def test_dinov2_as_meta_publishes_it_gives_timms_features(tmp_path):
    model, images = (
        timm_folder(tmp_path, "vit_large_patch14_dinov2", **SMALL_VIT, img_size=28),
        torch.rand(2, 3, 28, 28),
    )
    state = model.state_dict() | {"mask_token": torch.zeros(1, 64)}
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        reference = model((images - mean) / std)
    (tmp_path / "dinov2").mkdir()
    backbone = fs.load_backbone(saved(tmp_path / "dinov2" / "dinov2_vitl14_pretrain.pth", state), heads=2)
    assert difference(backbone, images, reference) <= 1e-5


@pytest.mark.parametrize(
    "kind", ["Dinov2Config", "Dinov2WithRegistersConfig", "DINOv3ViTConfig", "ViTConfig", "RAD-DINO", "Curia"]
)
def test_dinov2_and_its_kind_give_the_class_token_of_transformers(tmp_path, kind):
    import transformers

    config = getattr(transformers, kind if kind.endswith("Config") else "Dinov2Config")(
        **TINY | {"num_channels": 1 if kind == "Curia" else 3}
    )
    model = transformers.AutoModel.from_config(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    mean, std = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) if kind != "RAD-DINO" else ([0.5307] * 3, [0.2583] * 3)
    if kind == "RAD-DINO":
        transformers.BitImageProcessor(image_mean=mean, image_std=std).save_pretrained(tmp_path)
    if kind == "Curia":
        (tmp_path / "preprocessor_config.json").write_text(
            '{"image_processor_type": "CuriaImageProcessor", "crop_size": 512}'
        )
    images = torch.rand(2, 1 if kind == "Curia" else 3, 32, 32)
    normal = (images - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    if kind == "Curia":  # each slice by its own mean and deviation
        normal = torch.stack([(image - image.mean()) / image.std() for image in images])
    with torch.no_grad():
        reference = model(normal).last_hidden_state[:, 0]
    backbone, images = fs.load_backbone(tmp_path), images.expand(-1, 3, -1, -1)
    assert difference(backbone, images, reference) <= 1e-5
    shares, feature = backbone.evidence(images)
    assert shares.shape == (2, 4, 4)
    assert difference(backbone, images, feature(shares)) <= 1e-5
    assert backbone(images, maxima=True).shape == (2, 128)
    own = {
        "format": 1,
        "kind": "finetune_siglip",
        "model": prefixed(backbone.state_dict(), "backbone."),
        "backbone": backbone.config,
    }
    assert difference(fs.load_backbone(saved(tmp_path / "best_model.pth", own), 32), images, reference) <= 1e-5
    backbone.train()(images).sum().backward()
    assert all(p.grad is not None for p in backbone.parameters())  # an unused parameter would stall DDP
    (tmp_path / "config.json").unlink()
    with pytest.raises(fs.BadInput, match=r"config\.json"):
        fs.load_backbone(tmp_path / "model.safetensors")


def test_a_tower_stored_in_half_precision_is_built_again_in_float32(tmp_path):
    import transformers

    model = transformers.AutoModel.from_config(transformers.Dinov2Config(**TINY)).half()
    model.save_pretrained(tmp_path)
    backbone = fs.load_backbone(tmp_path)
    again = fs.build_backbone(json.loads(json.dumps(backbone.config)))
    assert {p.dtype for p in [*backbone.parameters(), *again.parameters()]} == {torch.float32}


def test_colipris_tower_is_read_from_its_own_names(tmp_path):
    from dynamic_network_architectures.architectures.primus import Primus

    shape = {"use_abs_pos_embed": False, "init_values": 0.1, "scale_attn_inner": True}
    primus = Primus(1, 144, (8, 8, 8), 1, 2, 12, (16, 16, 16), **shape).eval()
    primus.up_projection = nn.Identity()
    projector, pooler = nn.Conv3d(144, 48, 1), nn.MultiheadAttention(48, 12, batch_first=True)
    state = prefixed(primus.state_dict(), "backbone.") | prefixed(projector.state_dict(), "projector.")
    state = prefixed(state | prefixed(pooler.state_dict(), "pooler.attn."), "image_encoder.")
    save_file(state | {"text_encoder.x": torch.ones(1)}, tmp_path / "model.safetensors")
    volume = torch.rand(2, 1, 16, 16, 16)
    with torch.no_grad():
        x = projector(primus(volume * 2 - 1)).flatten(2).transpose(1, 2)
        reference = pooler(x.mean(1, keepdim=True), x, x)[0][:, 0]
    backbone = fs.load_backbone(tmp_path, 16)
    assert difference(backbone, volume.expand(-1, 3, -1, -1, -1), reference) <= 1e-5
    assert (backbone.windows, backbone.default_grid) == (fs.WINDOW_PRESETS["merlin"], (192, 16, 16))
    spl = torch.arange(24.0).view(1, 1, 2, 3, 4)  # S, P, L to R, A, S and back
    assert torch.equal(backbone.turn(spl), spl.permute(0, 1, 4, 3, 2).flip(2, 3))
    assert torch.equal(backbone.turn_back(backbone.turn(spl).movedim(1, -1)).movedim(-1, 1), spl)
    backbone.recompute = True
    backbone.train()(torch.rand(1, 3, 24, 16, 16)).sum().backward()  # volumes of another shape, computed again
    assert all(p.grad is not None for p in backbone.parameters())
    with torch.no_grad():
        features = backbone(volume.expand(-1, 3, -1, -1, -1))
    fs.add_lora(backbone, 2)
    again = fs.build_backbone(backbone.config)
    again.load_state_dict(fs.merged_weights(backbone))
    assert difference(again, volume.expand(-1, 3, -1, -1, -1), features) == 0


def test_timms_later_towers_have_the_tanh_gelu(tmp_path):
    model = timm_tower(patch_size=32, img_size=64, act_layer="gelu_tanh")
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        reference = model(images * 2 - 1)
    backbone = fs.load_backbone(saved(tmp_path / "x.bin", model.state_dict()))
    assert backbone.config["hidden_act"] == "gelu_pytorch_tanh"
    assert difference(backbone, images, reference) <= 1e-4


def resnet152(width, channels=3):
    from monai.networks.nets import ResNet

    planes = [width, width * 2, width * 4, width * 8]
    model = ResNet(
        block="bottleneck", layers=[3, 8, 36, 3], block_inplanes=planes, spatial_dims=3, n_input_channels=channels,
        conv1_t_size=(3, 7, 7), conv1_t_stride=(1, 2, 2), feed_forward=False, bias_downsample=False,
    ).eval()  # fmt: skip
    for name, tensor in [*model.named_buffers(), *model.named_parameters()]:
        if "running_var" in name:
            tensor.uniform_(0.5, 1.5)
        elif "running_mean" in name or ("bn" in name and "bias" in name):
            nn.init.normal_(tensor, std=0.1)
    return model


@pytest.fixture(scope="module")
def narrow_resnet():
    torch.manual_seed(0)
    model, volume = resnet152(2), torch.rand(1, 3, 16, 32, 32)
    with torch.no_grad():
        features = model(volume)
        assert not torch.equal(features, model(volume / 2))  # activations are alive: equality says something
        return model, volume, features


@pytest.mark.parametrize("prefix", PREFIXES)
def test_resnet3d_under_any_prefix_gives_exactly_monais_features(narrow_resnet, tmp_path, prefix):
    model, volume, reference = narrow_resnet
    state = prefixed(model.state_dict(), prefix) | {"text.bert.x": torch.ones(1)}
    backbone = fs.load_backbone(saved(tmp_path / "pytorch_model.bin", state))
    assert (backbone.family, backbone.volumetric, backbone.orientation) == ("resnet3d", True, "SRA")
    assert difference(backbone, volume, reference) == 0


def test_the_resnet152_of_full_width_gives_exactly_monais_features(tmp_path):
    model, volume = resnet152(64), torch.rand(1, 3, 16, 32, 32)
    with torch.no_grad():
        reference = model(volume)
    backbone = fs.load_backbone(saved(tmp_path / "pytorch_model.bin", prefixed(model.state_dict(), "visual.")))
    assert backbone.width == 2048
    assert backbone.default_grid == (160, 224, 224)
    assert difference(backbone, volume, reference) == 0


def test_old_files_without_batchnorms_step_counter_load(narrow_resnet, tmp_path):
    model, volume, reference = narrow_resnet
    state = {k: v for k, v in model.state_dict().items() if "num_batches" not in k}
    assert difference(fs.load_backbone(saved(tmp_path / "x.bin", state)), volume, reference) == 0


@pytest.mark.parametrize("kind", ["resnet50", "resnet50_multi_image"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_biovil_gives_health_multimodals_features(tmp_path, kind):
    from health_multimodal.image.model.model import ImageModel

    model = ImageModel(img_encoder_type=kind, joint_feature_size=8).eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        reference = model(images).img_embedding
    backbone = fs.load_backbone(saved(tmp_path / "image_model.pt", prefixed(model.state_dict(), "module.")))
    assert backbone.width == reference.shape[1]
    assert difference(backbone, images, reference) <= 1e-6
    adapted = fs.load_backbone(tmp_path / "image_model.pt", image_size=320).eval()
    fs.adapt_channels(adapted, 4)
    assert adapted.default_grid == (64, 320, 320)
    with torch.no_grad():
        grey = images[:, :1]
        same = backbone(grey.expand(-1, 3, -1, -1)), adapted(grey.expand(-1, 4, -1, -1))
    assert torch.allclose(*same, rtol=1e-4, atol=1e-5)
    fs.build_backbone(adapted.config).load_state_dict(adapted.state_dict())
    backbone.train()(images).sum().backward()
    assert all(p.grad is not None for p in backbone.parameters())  # an unused parameter would stall DDP


# Configuration from tensors alone


def meta_state(make):
    with torch.device("meta"):
        return make().state_dict()


@pytest.mark.parametrize(
    ("width", "layers", "heads", "mlp", "patch", "size"),
    [(1152, 27, 16, 4304, 14, 384), (1152, 27, 16, 4304, 14, 224), (1152, 27, 16, 4304, 14, 448)]
    + [(768, 12, 12, 3072, 16, size) for size in (224, 256, 384, 512)]
    + [(1024, 24, 16, 4096, 16, size) for size in (256, 384)]
    + [(768, 12, 12, 3072, 32, 256), (1536, 40, 16, 6144, 16, 384)],
)
def test_published_sizes_are_inferred(width, layers, heads, mlp, patch, size):
    expected = {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": mlp,
        "patch_size": patch, "image_size": size,
    }  # fmt: skip
    state = meta_state(lambda: tiny_tower(**expected))
    config = fs.read_tensors(prefixed(state, "vision_model."), fs.Found("meta")).config
    assert {key: config[key] for key in expected} == expected
    assert config["hidden_act"] == "gelu_pytorch_tanh"


@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch16_siglip_224",
        "vit_base_patch32_siglip_256",
        "vit_large_patch16_siglip_384",
        "vit_large_patch16_siglip_512",
        "vit_so400m_patch14_siglip_384",
        "vit_so400m_patch16_siglip_256",
        "vit_giantopt_patch16_siglip_384",
    ],
)
def test_timms_registered_towers_are_inferred_activation_included(name):
    import timm

    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    config = fs.read_tensors(prefixed(model.state_dict(), "visual.trunk."), fs.Found("meta")).config
    act = model.blocks[0].mlp.act
    tanh = getattr(act, "approximate", None) == "tanh" or "tanh" in type(act).__name__.lower()
    assert config["hidden_act"] == ("gelu_pytorch_tanh" if tanh else "gelu")
    assert config["num_attention_heads"] == model.blocks[0].attn.num_heads
    assert config["image_size"] == model.patch_embed.img_size[0]
    assert config["num_hidden_layers"] == len(model.blocks)


def test_heads_are_overridden_assumed_aloud_or_asked_for(tower, tmp_path, caplog):
    path = saved(tmp_path / "x.bin", tower[0].state_dict())
    with caplog.at_level(logging.INFO):
        assert fs.load_backbone(path).config["num_attention_heads"] == 1
    assert "1 heads (--backbone-heads)" in caplog.text
    assert fs.load_backbone(path, heads=4).config["num_attention_heads"] == 4
    odd = saved(tmp_path / "odd.bin", tiny_tower(hidden_size=96).state_dict())
    with pytest.raises(fs.BadInput, match="--backbone-heads"):
        fs.load_backbone(odd)
    with pytest.raises(fs.BadInput, match="do not divide"):
        fs.load_backbone(odd, heads=5)


def test_a_config_of_another_tower_is_ignored_aloud(tower, tmp_path, caplog):
    path = saved(tmp_path / "pytorch_model.bin", tower[0].state_dict())
    (tmp_path / "config.json").write_text('{"model_type": "siglip", "vision_config": {"hidden_size": 1152}}')
    with caplog.at_level(logging.INFO):
        fs.load_backbone(path, heads=2)
    assert "ignored" in caplog.text


def test_build_backbone_needs_no_file(tower, narrow_resnet, tmp_path):
    for model, images in ((tower[0], tower[1]), narrow_resnet[:2]):
        backbone = fs.load_backbone(saved(tmp_path / "x.bin", model.state_dict()), heads=2).eval()
        again = fs.build_backbone(json.loads(json.dumps(backbone.config))).eval()
        again.load_state_dict(backbone.state_dict())
        with torch.no_grad():
            assert torch.equal(again(images), backbone(images))


def test_own_checkpoint_is_taken_as_pretrained(tower, tmp_path):
    model, images, reference = tower
    backbone = fs.load_backbone(saved(tmp_path / "x.bin", model.state_dict()), heads=2)
    state = prefixed(backbone.state_dict(), "backbone.") | {"head.weight": torch.ones(2)}
    own = {"format": 1, "kind": "finetune_siglip", "model": state, "backbone": backbone.config}
    assert difference(fs.load_backbone(saved(tmp_path / "best_model.pth", own)), images, reference) <= 1e-5
    for change in ({"format": 2}, {"backbone": {}}, {"kind": "finetune_siglip.run"}, {"model": {"backbone.x": 3}}):
        with pytest.raises(fs.BadInput):
            fs.load_backbone(saved(tmp_path / "bad.pth", own | change))


# Sizes


def test_position_embeddings_are_interpolated_only_where_the_grid_differs(tower, tmp_path):
    model, _, _ = tower
    path = saved(tmp_path / "x.bin", model.state_dict())
    table = model.embeddings.position_embedding.weight
    assert torch.equal(fs.load_backbone(path, 32, heads=2).net.embeddings.position_embedding.weight, table)
    larger = fs.load_backbone(path, 48, heads=2).net.embeddings.position_embedding.weight
    with torch.no_grad():
        ours = larger.view(6, 6, 64)
        reference = nn.functional.interpolate(
            table.view(4, 4, 64).permute(2, 0, 1)[None], size=(6, 6), mode="bicubic", antialias=True
        )[0].permute(1, 2, 0)
    assert torch.allclose(ours, reference, atol=1e-6)
    with torch.no_grad():
        theirs = model(pixel_values=torch.rand(1, 3, 48, 48), interpolate_pos_encoding=True).pooler_output
        assert fs.load_backbone(path, 48, heads=2).eval()(torch.rand(1, 3, 48, 48)).shape == theirs.shape
    with pytest.raises(fs.BadInput, match="image-size"):
        fs.load_backbone(path, 4, heads=2)


def test_convolutional_encoders_take_another_image_size_as_they_are(narrow_resnet, tmp_path):
    model, volume, reference = narrow_resnet
    backbone = fs.load_backbone(saved(tmp_path / "x.bin", model.state_dict()), image_size=192)
    assert backbone.default_grid == (160, 192, 192)
    assert difference(backbone, volume, reference) == 0


@pytest.mark.parametrize("channels", [1, 2, 4, 6, 7])
@pytest.mark.parametrize("family", ["siglip", "resnet3d"])
def test_a_first_convolution_for_other_channels_keeps_the_sum(tower, narrow_resnet, tmp_path, channels, family):
    model, images, _ = tower if family == "siglip" else narrow_resnet
    path = saved(tmp_path / "x.bin", model.state_dict())
    grey = images[:, :1]
    with torch.no_grad():
        same = fs.load_backbone(path, heads=2).eval()(grey.expand(-1, 3, *grey.shape[2:]))
        backbone = fs.load_backbone(path, heads=2).eval()
        fs.adapt_channels(backbone, channels)
        adapted = backbone(grey.expand(-1, channels, *grey.shape[2:]))
    assert float((same - adapted).abs().max()) <= 1e-5 * max(1.0, float(same.abs().max()))


def test_stored_single_channel_weights_serve_three_windows(tmp_path):
    model = tiny_tower(num_channels=1)
    path = saved(tmp_path / "x.bin", model.state_dict())
    grey = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        reference = model(pixel_values=grey * 2 - 1).pooler_output
    assert difference(fs.load_backbone(path, heads=2), grey.expand(-1, 3, -1, -1), reference) <= 1e-5


# The forward of our own


def test_all_patches_kept_equals_no_mask_and_dropped_ones_have_no_say(tower, tmp_path):
    model, images, reference = tower
    backbone = fs.load_backbone(saved(tmp_path / "x.bin", model.state_dict()), heads=2).eval()
    keep = torch.ones(3, 16, dtype=torch.bool)
    with torch.no_grad():
        assert float((backbone(images, keep) - reference).abs().max()) <= 1e-5
        keep[0, 5:] = keep[1, :3] = keep[2, ::2] = False
        features = backbone(images, keep)
        blanked = images.clone()  # whatever a dropped patch shows must not matter
        blanked[0, :, 8:, 8:] = 0.123
        blanked[1, :, :8, :24] = 0.9
        assert torch.allclose(backbone(blanked, keep), features, atol=1e-6)
        for row in range(3):  # alone, without padding
            assert torch.allclose(backbone(images[row : row + 1], keep[row : row + 1])[0], features[row], atol=1e-5)
        nothing = backbone(images, torch.zeros(3, 16, dtype=torch.bool))
    assert torch.isfinite(nothing).all()


def test_kept_patches_equal_a_plain_loop_over_the_shorter_sequence(tower, tmp_path):
    model, images, _ = tower
    backbone = fs.load_backbone(saved(tmp_path / "x.bin", model.state_dict()), heads=2).eval()
    keep = torch.rand(3, 16) < 0.5
    with torch.no_grad():
        embedded = model.embeddings(images * 2 - 1)
        for row, features in enumerate(backbone(images, keep)):
            x = embedded[row : row + 1, keep[row]]
            for block in model.encoder.layers:
                x = block(x, None)
            assert torch.allclose(model.head(model.post_layernorm(x))[0], features, atol=1e-5)


def test_gradients_flow_through_masked_and_unmasked_forwards_alike(tower, tmp_path):
    model, images, _ = tower
    backbone = fs.load_backbone(saved(tmp_path / "x.bin", model.state_dict()), heads=2)
    grads = []
    for keep in (None, torch.ones(3, 16, dtype=torch.bool)):
        backbone.zero_grad()
        backbone(images, keep).square().sum().backward()
        grads.append([p.grad.clone() for p in backbone.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(*grads, strict=True))


def test_pooling_the_tokens_is_the_forward(tower, narrow_resnet, tmp_path):
    for (model, images, _), grid in ((tower, (4, 4)), (narrow_resnet, (1, 1, 1))):
        backbone = fs.load_backbone(saved(tmp_path / "x.bin", model.state_dict()), heads=2).eval()
        with torch.no_grad():
            tokens = backbone.tokens(images)
            assert torch.equal(backbone.summary(tokens), backbone(images))
        assert tokens.shape == (len(images), *grid, backbone.width)
        assert len(backbone.blocks()) == {"siglip": 2, "resnet3d": 50}[backbone.family]


def test_an_image_of_another_size_is_refused(tower, tmp_path):
    backbone = fs.load_backbone(saved(tmp_path / "x.bin", tower[0].state_dict()), heads=2)
    with pytest.raises(RuntimeError, match=r"size of tensor a \(64\)"):
        backbone(torch.rand(1, 3, 64, 64))


def test_a_tower_without_pooling_head_takes_the_mean_where_its_config_says_so(tmp_path):
    model, images = tiny_tower(vision_use_head=False), torch.rand(2, 3, 32, 32)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        reference = model(pixel_values=images * 2 - 1).last_hidden_state.mean(1)
    assert difference(fs.load_backbone(tmp_path), images, reference) <= 1e-5
    (tmp_path / "config.json").unlink()  # without one, no tensor of a head says so as well
    assert difference(fs.load_backbone(tmp_path, heads=2), images, reference) <= 1e-5


# Freezing


def test_layers_are_counted_in_forward_order(tower, tmp_path):
    backbone = fs.load_backbone(saved(tmp_path / "x.bin", tower[0].state_dict()), heads=2)
    names = [name for name, _ in fs.backbone_layers(backbone)]
    assert names[0] == "net.embeddings.patch_embedding"
    assert names.index("net.post_layernorm") == names.index("net.head") - 1
    assert "net.head.attention" in names
    owned = [p for _, layer in fs.backbone_layers(backbone) for p in layer.parameters(recurse=False)]
    assert {id(p) for p in owned} == {id(p) for p in backbone.parameters()}
    assert len(owned) == len(list(backbone.parameters()))


@pytest.mark.parametrize("family", ["siglip", "resnet3d"])
def test_frozen_tensors_and_statistics_stay_equal_to_the_bit(tower, narrow_resnet, tmp_path, family):
    model, images, _ = tower if family == "siglip" else narrow_resnet
    images = images.expand(2, *images.shape[1:]) if len(images) == 1 else images
    backbone = fs.load_backbone(saved(tmp_path / "x.bin", model.state_dict()), heads=2)
    count = fs.freeze_up_to(backbone, len(fs.backbone_layers(backbone)) // 2)
    backbone.train()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=0.1)
    backbone(images).square().sum().backward()
    optimizer.step()
    changed = {k for k, v in backbone.state_dict().items() if not torch.equal(v, before[k])}
    layers = fs.backbone_layers(backbone)
    frozen = {f"{name}." for name, layer in layers[:count] if not isinstance(layer, nn.MultiheadAttention)}
    assert changed
    assert not [k for k in changed if k.startswith(tuple(frozen))]
    assert all(not layer.training for _, layer in layers[:count] if not list(layer.children()))
    assert layers[-1][1].training


def test_a_frozen_prefix_builds_no_graph(tower, tmp_path):
    backbone = fs.load_backbone(saved(tmp_path / "x.bin", tower[0].state_dict()), heads=2).train()
    names = [name for name, _ in fs.backbone_layers(backbone)]
    fs.freeze_up_to(backbone, names.index("net.encoder.layers.1.layer_norm1"))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        x, _ = None, backbone.net.encoder.layers[0].register_forward_hook(lambda *_: kept.append("end of the prefix"))
        assert x is None
        backbone(tower[1]).sum().backward()
    assert isinstance(kept[0], str)
    fs.freeze_up_to(backbone, "all")
    assert not backbone(tower[1]).requires_grad


def test_freezing_is_reported_and_undone(tower, tmp_path, caplog):
    backbone = fs.load_backbone(saved(tmp_path / "x.bin", tower[0].state_dict()), heads=2)
    total = len(fs.backbone_layers(backbone))
    with caplog.at_level(logging.INFO):
        assert fs.freeze_up_to(backbone, 3) == 3
        assert "last frozen net.encoder.layers.0.layer_norm1, first trained net.encoder.layers.0" in caplog.text
        assert "whole backbone" not in caplog.text
        assert fs.freeze_up_to(backbone, total) == total
        assert "whole backbone" in caplog.text
        caplog.clear()
        assert fs.freeze_up_to(backbone, "all") == total
        assert "whole backbone" not in caplog.text
    assert not any(module.training for module in backbone.train().modules())
    assert fs.freeze_up_to(backbone, 0) == 0
    assert all(p.requires_grad for p in backbone.parameters())
    assert all(module.training for module in backbone.train().modules())


# Wrong files are refused by name


def tensors(*names):
    return {name: torch.ones(2, 2) for name in names}


WRONG_TENSORS = {
    "CT-CLIP": tensors(
        "visual_transformer.enc_spatial_transformer.layers.0.0.dsconv.weight", "to_visual_latent.weight"
    ),
    "MedicalNet": {"module.conv1.weight": torch.ones(4, 1, 7, 7, 7), "module.layer3.35.conv3.weight": torch.ones(2, 2)},
    "CLIP": tensors("vision_model.embeddings.patch_embedding.weight", "vision_model.embeddings.class_embedding"),
    "LoRA": tensors("base.layers.0.q_proj.lora_A.weight"),
    "unknown model \\(weight, bias\\)": tensors("weight", "bias"),
    "no tensor at all": {"epoch": 3},
}


@pytest.mark.parametrize("seems", WRONG_TENSORS)
def test_weights_of_something_else_are_refused_saying_what_they_seem_to_be(tmp_path, seems):
    path = saved(tmp_path / "pytorch_model.bin", WRONG_TENSORS[seems])
    with pytest.raises(fs.BadInput, match=seems) as caught:
        fs.load_backbone(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "such as google/siglip-base-patch16-224" in str(caught.value)


def write_bytes(content):
    return lambda path: path.write_bytes(content)


def write_npz(path):
    with path.open("wb") as file:
        np.savez(file, image=np.zeros((1, 2, 2, 2)))


def write_script(path):
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), path)


def write_truncated(path):
    torch.save(tiny_tower().state_dict(), path)
    os.truncate(path, path.stat().st_size // 2)


def write_truncated_safetensors(path):
    save_file(tiny_tower().state_dict(), path)
    os.truncate(path, path.stat().st_size // 2)


def write_tar(path):
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("model.safetensors"))


def write_adapted(path):
    from peft import LoraConfig, get_peft_model

    torch.save(get_peft_model(tiny_tower(), LoraConfig(r=2, target_modules=["q_proj"])).state_dict(), path)


WRONG_FILES = {
    "Git LFS pointer": write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    "web page": write_bytes(b"\n<!DOCTYPE html><html><title>Sign in</title>"),
    "JSON": write_bytes(b'{"error": "Repository not found"}'),
    "HDF5": write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100)),
    "GGUF": write_bytes(b"GGUF" + bytes(100)),
    "gzip": write_bytes(b"\x1f\x8b" + bytes(100)),
    "tar or zip": write_tar,
    "NumPy archive": write_npz,
    "TorchScript": write_script,
    "a quantised model": lambda path: torch.save(
        torch.ao.quantization.quantize_dynamic(tiny_tower(), {nn.Linear}, dtype=torch.qint8).state_dict(), path
    ),
    "DeepSpeed ZeRO-3": lambda path: torch.save({k: torch.empty(0) for k in tiny_tower().state_dict()}, path),
    "merge it into its base model": write_adapted,
    "ONNX": write_bytes(b"\x08\x07\x12\x07pytorch"),
    "run code": lambda path: torch.save(nn.Linear(2, 2), path),
    "holds a list": lambda path: torch.save([torch.ones(1)], path),
    "empty": write_bytes(b""),
    "damaged or incomplete (KeyError": write_bytes(b"hello"),
    "damaged or incomplete": write_truncated,
    "damaged or incomplete ": write_truncated_safetensors,
    "damaged": write_bytes(bytes(range(128, 256)) * 3),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("reason", WRONG_FILES)
def test_files_that_are_not_weights_are_refused_by_name(tmp_path, reason):
    path = tmp_path / "pytorch_model.bin"
    WRONG_FILES[reason](path)
    with pytest.raises(fs.BadInput, match=re.escape(reason.strip())) as caught:
        fs.load_backbone(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_trainers_keep_beside_the_weights_is_read_without_running_it(tower, tmp_path):
    import collections
    import datetime
    import pathlib

    model, images, reference = tower
    beside = {
        "args": argparse.Namespace(lr=np.float64(0.1), out=pathlib.Path("a/b"), log=pathlib.PurePosixPath("c")),
        "best": np.float32(0.5), "seen": np.arange(3), "names": np.array(["a", "b"]), "flags": np.array([True]),
        "when": datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc), "took": datetime.timedelta(hours=1),
        "day": datetime.date(2026, 1, 2), "order": collections.OrderedDict(a=1), "kind": np.dtype("float32"),
    }  # fmt: skip
    before = torch.serialization.get_safe_globals()
    path = saved(tmp_path / "x.pth", beside | {"model": collections.OrderedDict(model.state_dict())})
    assert difference(fs.load_backbone(path, heads=2), images, reference) <= 1e-5
    assert set(torch.serialization.get_safe_globals()) == set(before)  # and only while this file is read


def test_a_sharded_checkpoint_of_torch_is_named_with_the_command_that_converts_it(tower, tmp_path, monkeypatch):
    import subprocess
    import sys

    import torch.distributed.checkpoint as dcp

    model, images, reference = tower
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "dcp")
    for source in (tmp_path / "dcp", next((tmp_path / "dcp").glob("*.distcp"))):
        with pytest.raises(fs.BadInput, match="dcp_to_torch") as caught:
            fs.load_backbone(source)
    command = re.search(r"`python (.*?)`", str(caught.value))[1]
    subprocess.run([sys.executable, *command.split()], cwd=tmp_path, check=True, capture_output=True)
    assert difference(fs.load_backbone(tmp_path / "model.pt", heads=2), images, reference) <= 1e-5


def test_nothing_in_a_file_is_ever_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    with pytest.raises(fs.BadInput, match="run code"):
        fs.load_backbone(saved(tmp_path / "x.bin", {"w": Trap()}))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["encoder.layers.1.mlp.fc2.bias", "head.probe", "post_layernorm.weight"])
def test_missing_tensors_stop_the_run(tower, tmp_path, name):
    state = {k: v for k, v in tower[0].state_dict().items() if k != name}
    with pytest.raises(fs.BadInput, match=rf'incomplete.*Missing key\(s\) in state_dict: "{name}"\.'):
        fs.load_backbone(saved(tmp_path / "x.bin", state), heads=2)


def test_the_layers_that_a_config_promises_must_be_there(tower, tmp_path):
    tower[0].save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(fs.BadInput, match=r'incomplete.*Missing key\(s\) in state_dict: "encoder\.layers\.2'):
        fs.load_backbone(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"encoder.layers.0.mlp.fc2.weight": torch.ones(3, 3)}, "size mismatch for encoder.layers.0.mlp.fc2.weight"),
        (
            {"encoder.layers.0.ls1.gamma": torch.ones(64)},
            r"Unexpected key\(s\) in state_dict: .encoder.layers.0.ls1.gamma",
        ),
        ({"post_layernorm.bias": torch.full((64,), float("nan"))}, "not finite"),
        ({"post_layernorm.bias": torch.ones(64, dtype=torch.int8)}, "quantised"),
        ({"embeddings.patch_embedding.weight": torch.ones(64)}, "unexpected shape"),
    ],
)
def test_unfitting_tensors_stop_the_run(tower, tmp_path, change, reason):
    with pytest.raises(fs.BadInput, match=reason):
        fs.load_backbone(saved(tmp_path / "x.bin", tower[0].state_dict() | change), heads=2)


def test_places_without_weights_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(fs.BadInput, match="no such file"):
        fs.load_backbone(tmp_path / "missing.bin")
    with pytest.raises(fs.BadInput, match="no such file"):
        fs.load_backbone("ckpt/missing.bin")
    with pytest.raises(fs.BadInput, match="found none"):
        fs.load_backbone(tmp_path)
    saved(tmp_path / "a.pt", {})
    saved(tmp_path / "b.pt", {})
    with pytest.raises(fs.BadInput, match=r"found a\.pt, b\.pt"):
        fs.load_backbone(tmp_path)
    os.mkfifo(tmp_path / "fifo.bin")
    with pytest.raises(fs.BadInput, match="not a regular file"):
        fs.load_backbone(tmp_path / "fifo.bin")


@pytest.mark.parametrize("name", ["../outside.safetensors", "absent.safetensors"])
def test_an_index_names_only_files_that_lie_beside_it(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(tiny_tower().state_dict(), tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(fs.BadInput):
        fs.load_backbone(folder)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub cache with one model in it, and no network."""
    from huggingface_hub import constants

    folder = tmp_path / "hub" / "models--someone--tower"
    snapshot = folder / "snapshots" / "abc"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    snapshot.mkdir(parents=True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return snapshot


def test_hub_models_come_from_the_cache_without_network(tower, hub):
    model, images, reference = tower
    with pytest.raises(fs.BadEnvironment, match="out of reach"):
        fs.load_backbone("someone/tower")
    model.save_pretrained(hub, max_shard_size="50KB")
    address = "https://huggingface.co/someone/tower"
    names = ("someone/tower", "hf-hub:someone/tower", address, f"{address}/tree/main", hub.parents[1], hub)
    for source in names:
        assert difference(fs.load_backbone(source), images, reference) <= 1e-5, source
    shard = sorted(hub.glob("model-*.safetensors"))[1]
    assert difference(fs.load_backbone(shard), images, reference) <= 1e-5  # a lone shard whose others lie beside it
    shard.unlink()
    for source in (hub, hub.parents[1], sorted(hub.glob("model-*.safetensors"))[0]):
        with pytest.raises(fs.BadInput, match=f"{shard.name} is not beside it"):
            fs.load_backbone(source)


def test_a_file_named_after_its_place_in_the_hubs_cache_is_a_file(tower, hub, tmp_path):
    model, images, reference = tower
    path = saved(tmp_path / "models--someone--tower.pt", model.state_dict())
    assert difference(fs.load_backbone(path, heads=2), images, reference) <= 1e-5
    (hub.parents[1] / "refs" / "main").unlink()
    (hub.parent / "def").mkdir()
    for folder in (hub.parents[1], hub.parents[2]):
        with pytest.raises(fs.BadInput, match="the hub's cache"):
            fs.load_backbone(folder)


# Memory


def test_weights_stay_mapped_to_their_file(tower, tmp_path):
    path = saved(tmp_path / "x.bin", tower[0].state_dict())
    backbone = fs.load_backbone(path, heads=2)
    weight = backbone.net.encoder.layers[0].mlp.fc1.weight
    with zipfile.ZipFile(path) as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
    stored = path.read_bytes()
    with torch.no_grad():
        weight.add_(1)  # written to memory only, never to the file
    assert path.read_bytes() == stored
    assert not any(p.is_meta for p in [*backbone.parameters(), *backbone.buffers()])


# Low-rank updates


def test_lora_starts_at_no_change_trains_little_and_merges(tower, tmp_path):
    model, images, reference = tower
    backbone = fs.load_backbone(saved(tmp_path / "x.bin", model.state_dict()), heads=2)
    plain = {k: v.clone() for k, v in backbone.state_dict().items()}
    fs.add_lora(backbone, 2)
    assert difference(backbone, images, reference) <= 1e-5
    trained = [name for name, p in backbone.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * (2 * 4 + 1)  # two layers' projections, and the patches
    assert all("lora_" in name for name in trained)
    assert fs.merged_weights(backbone).keys() == plain.keys()
    assert all(torch.equal(value, plain[name]) for name, value in fs.merged_weights(backbone).items())
    optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        backbone.train()(images).square().sum().backward()
        optimizer.step()
    merged = fs.build_backbone(backbone.config)
    merged.load_state_dict(fs.merged_weights(backbone))
    with torch.no_grad():
        trained_features = backbone.eval()(images)
    assert float((trained_features - reference).abs().max()) > 1e-4
    assert difference(merged, images, trained_features) <= 1e-5


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva_giant_patch14_224", "vit_base_patch16_dinov3"])
def test_every_adapter_has_its_part_in_what_a_tower_of_timm_computes(tmp_path, name):
    """A bias kept beside the fused projection made timm use the projection's weight itself, without its adapters."""
    timm_folder(tmp_path, name, **SMALL_VIT)
    backbone = fs.load_backbone(tmp_path, heads=2)
    fs.add_lora(backbone, 2)
    for key, parameter in backbone.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter, std=0.05)
    size = backbone.config["image_size"]
    images = torch.rand(1, 3, size, size)
    backbone.train()(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in backbone.parameters() if p.requires_grad)
    merged = fs.build_backbone(backbone.config).eval()
    merged.load_state_dict(fs.merged_weights(backbone))
    with torch.no_grad():
        assert difference(backbone, images, merged(images)) <= 1e-4


def test_lora_is_refused_for_other_families(narrow_resnet, tmp_path):
    backbone = fs.load_backbone(saved(tmp_path / "x.bin", narrow_resnet[0].state_dict()))
    with pytest.raises(fs.BadInput, match="for ViTs"):
        fs.add_lora(backbone, 2)
