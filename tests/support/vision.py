"""A small vision-language model of random weights, which vLLM serves without torchvision."""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path

SPECIAL = [
    "<unk>",
    "<s>",
    "</s>",
    "<image>",
    "<pad>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
]
TEMPLATE = """\
{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}\
{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}\
{% endif %}<end_of_utterance>
{% endfor %}Assistant:"""
IMAGE_SIDE, PATCH = 56, 14


def make_tiny_vlm(folder: Path) -> Path:
    """Create an Idefics3 with 2 + 2 layers and a tokenizer of bytes; an image is 4 tokens."""
    import torch
    import transformers as tf
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    special = SPECIAL + [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocab = {word: number for number, word in enumerate(words)}
    bare = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    bare.add_special_tokens([AddedToken(word, special=True) for word in special])
    named = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "global_image_tag": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=bare,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=named,
    )
    tokenizer.chat_template = TEMPLATE
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = tf.LlamaConfig(
        **sizes,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=len(vocab),
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=4,
    )
    config = tf.Idefics3Config(
        vision_config={**sizes, "image_size": IMAGE_SIDE, "patch_size": PATCH},
        text_config=text,
        image_token_id=3,
        scale_factor=2,
        pad_token_id=4,
    )
    torch.manual_seed(0)
    tf.Idefics3ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    images = tf.Idefics3ImageProcessorPil(
        size={"longest_edge": 2 * IMAGE_SIDE}, max_image_size={"longest_edge": IMAGE_SIDE}, do_image_splitting=False
    )
    tf.Idefics3Processor(
        image_processor=images, tokenizer=tokenizer, image_seq_len=4, chat_template=TEMPLATE
    ).save_pretrained(folder)
    return folder


def picture(color: tuple[int, int, int]) -> bytes:
    """Return a small PNG of one colour."""
    from PIL import Image

    data = io.BytesIO()
    Image.new("RGB", (IMAGE_SIDE, IMAGE_SIDE), color).save(data, "PNG")
    return data.getvalue()


def data_url(color: tuple[int, int, int]) -> str:
    """Return the picture as a data URL."""
    return "data:image/png;base64," + base64.b64encode(picture(color)).decode()


def make_torchvision_vlm(folder: Path, tokenizer: Path) -> Path:
    """Create the files of a LLaVA that vLLM reads before the weights; it imports torchvision to do so."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": {**sizes, "model_type": "llama", "num_key_value_heads": 1, "vocab_size": 49152},
        "vision_config": {**sizes, "model_type": "clip_vision_model", "image_size": IMAGE_SIDE, "patch_size": PATCH},
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder)
    return folder
