"""Image embeddings by the VLM's own tower and by named encoders."""

import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from tiny_vlms import make, random_images
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from realign.digits.scenes import make_scenes
from realign.modeling.images import bundle_of
from realign.pairs.retrieval.embed import Embedder


def test_the_digits_tower_by_default(vlm, processor, scenes):
    images = [scene.image for scene in scenes[:10]]
    found = Embedder(None, None, batch_size=4, dtype="fp32")(images)
    pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        states = vlm.model.vision_tower(pixels).last_hidden_state.mean(1)
    truth = torch.nn.functional.normalize(states, dim=-1).numpy()
    assert found.dtype == np.float32 and found.shape == (10, 128)
    np.testing.assert_allclose(found, truth, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert Embedder(None, None)([]).shape == (0, 0)


def test_bf16_is_near_fp32_and_still_unit(scenes):
    images = [scene.image for scene in scenes[:6]]
    exact = Embedder(None, None, dtype="fp32")(images)
    rough = Embedder(None, None, dtype="bf16")(images)
    np.testing.assert_allclose(np.linalg.norm(rough, axis=1), 1, atol=1e-6)
    assert 0 < np.abs(exact - rough).max() < 0.02
    assert ((exact * rough).sum(1) > 0.999).all()


# Pixels of one size, tiles of one size, patches with a grid, tiles with a mask.
@pytest.mark.parametrize("family", ["gemma3", "llava_next", "qwen2_vl", "idefics3", "internvl"])
def test_own_tower_of_a_family(family, tmp_path):
    vlm, processor = make(family)
    vlm.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    images = random_images(np.random.default_rng(0), 5)
    found = Embedder(None, str(tmp_path), batch_size=2, dtype="fp32")(images)
    truth = []
    for image in images:
        made = processor(images=[[image]], text=[processor.image_token], return_tensors="pt")
        inputs = bundle_of(made)
        with torch.no_grad():
            if family == "gemma3":
                tower = vlm.model.get_encoder("image")
                seen = tower(inputs["pixel_values"]).last_hidden_state
            else:
                seen = vlm.model.get_image_features(**inputs).pooler_output
        seen = torch.cat([part.flatten(0, -2) for part in seen]) if len(seen) > 1 else seen[0]
        truth.append(torch.nn.functional.normalize(seen.flatten(0, -2).mean(0), dim=0))
    np.testing.assert_allclose(found, torch.stack(truth).numpy(), atol=1e-5)


def _encoder(kind, folder, processor):
    """Folder of a tiny CLIP or SigLIP model, and the model."""
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision = {**small, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    text = {**small, "num_attention_heads": 2, "vocab_size": 20}
    classes = {"clip": (CLIPConfig, CLIPModel), "siglip": (SiglipConfig, SiglipModel)}[kind]
    encoder = classes[1](classes[0](vision_config=vision, text_config=text)).eval()
    encoder.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    return encoder


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_named_encoder(kind, tmp_path, processor):
    encoder = _encoder(kind, tmp_path, processor)
    images = [scene.image for scene in make_scenes(5, biased=False)]
    found = Embedder(str(tmp_path), None, batch_size=2, dtype="fp32")(images)
    pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        pooled = encoder.vision_model(pixel_values=pixels).pooler_output
        truth = encoder.visual_projection(pooled) if kind == "clip" else pooled
    truth = torch.nn.functional.normalize(truth, dim=-1).numpy()
    assert np.abs(found - truth).max() < 1e-6


def test_pictures_of_odd_shapes_are_embedded(tmp_path, processor, monkeypatch):
    """A height of 3 is not mistaken for channels, and a strip is not enlarged to gigabytes."""
    _encoder("clip", tmp_path, processor)
    embed = Embedder(str(tmp_path), None, dtype="fp32")
    embed.open()
    made, resize = [], Image.Image.resize
    monkeypatch.setattr(
        Image.Image,
        "resize",
        lambda i, size, *a, **k: made.append(size) or resize(i, size, *a, **k),
    )
    sizes = [(40, 3), (3, 40), (1, 1), (3, 1), (20_000, 2), (1, 9000)]
    drawn = [Image.new("RGB", size, (200, 30, 90)) for size in sizes]
    flat = embed([Image.new("RGB", (16, 16), (200, 30, 90))])
    np.testing.assert_allclose(embed(drawn), np.repeat(flat, 6, axis=0), atol=1e-5)
    assert max(max(size) for size in made) == 20 * 16


def test_which_encoders_are_refused(tmp_path, vlm, processor):
    with pytest.raises(ValueError, match="dtype is 'fp8'"):
        Embedder(None, None, dtype="fp8")
    with pytest.raises(ValueError, match="batch_size is 0"):
        Embedder(None, None, batch_size=0)
    with pytest.raises(ValueError, match="no image encoder could be loaded from --embed-model"):
        Embedder(str(tmp_path / "none"), None).open()
    vlm.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'llava' model without a single feature vector"):
        Embedder(str(tmp_path), None).open()


def test_embeddings_that_are_not_finite_are_refused(tmp_path, processor):
    encoder = _encoder("clip", tmp_path, processor)
    with torch.no_grad():
        encoder.visual_projection.weight[0, 0] = torch.inf
    encoder.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not finite; check its weights"):
        Embedder(str(tmp_path), None, dtype="fp32")([Image.new("RGB", (16, 16))])
    with pytest.raises(ValueError, match="use --dtype fp32"):
        Embedder(str(tmp_path), None, dtype="bf16")([Image.new("RGB", (16, 16))])


def test_sentence_transformers_by_name(monkeypatch):
    """A fake package answers the calls with the mean colours of an image."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = []

    class Stand:
        def __init__(self, name, device, trust_remote_code, **options):
            assert options == {"model_kwargs": {"use_safetensors": True}}
            asked.append((name, device, trust_remote_code))

        def to(self, dtype):
            asked.append(dtype)
            return self

        def encode(self, images, batch_size, convert_to_tensor, show_progress_bar):
            if asked[0][0] == "text-only":
                raise AttributeError("'Image' object has no attribute 'strip'")
            return torch.stack([torch.tensor(np.asarray(i).mean((0, 1))) for i in images])

    package = ModuleType("sentence_transformers")
    package.SentenceTransformer = Stand
    monkeypatch.setitem(sys.modules, "sentence_transformers", package)
    reds = [Image.new("RGB", (4, 4), (3 * n, 4 * n, 0)) for n in (1, 2)]
    found = Embedder("st:clip-ViT-B-32", None, batch_size=1, dtype="bf16")(reds)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert asked == [("clip-ViT-B-32", device, False), torch.bfloat16]
    np.testing.assert_allclose(found, [[0.6, 0.8, 0]] * 2, atol=1e-6)
    asked.clear()
    Embedder("sentence-transformers/clip-ViT-B-32", None).open()
    assert asked[0][0] == "sentence-transformers/clip-ViT-B-32"
    asked.clear()
    with pytest.raises(ValueError, match="cannot embed an image"):
        Embedder("st:text-only", None).open()
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ValueError, match=r"realign\[sentences\]"):
        Embedder("st:clip-ViT-B-32", None).open()
