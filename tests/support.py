"""The page docs/support.md and the table behind it: which networks of timm are encoders, and how.

`python -m tests.support` looks at all of `NAMES` again, in some minutes, and writes both.
`tests/models/test_support.py` holds a few rows, and slowly all of them, against the networks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import date
from importlib import metadata

from ssl_seg.models.support import GENERAL, Support, shipped, support_of, write
from tests import ROOT

PAGE = ROOT / "docs" / "support.md"
COMMAND = "python -m tests.support"
# One or a few of each family of timm, the small ones; what is true of them is true of their larger sisters.
LISTED = """
resnet18 resnet50 resnext50_32x4d seresnet50 ecaresnet26t resnetrs50 resnetblur50 resnetv2_50 resnetv2_50x1_bit
legacy_seresnet18 wide_resnet50_2 skresnet18 resnest14d res2net50_26w_4s res2next50 regnetx_002 regnety_002 regnetz_005
densenet121 vgg11 vgg16_bn dla34 dpn68 hrnet_w18_small vovnet39a ese_vovnet19b_dw selecsls42 tresnet_m gcresnet33ts
bat_resnext26ts halonet26t botnet26t_256 lambda_resnet26t resnet50_clip repvgg_a0 mobileone_s0 gernet_s cspresnet50
darknet53 cs3darknet_s cspnext_tiny nf_resnet50 dm_nfnet_f0 hgnetv2_b0 rdnet_tiny
inception_v3 inception_v4 inception_resnet_v2 legacy_xception xception41
efficientnet_b0 tf_efficientnet_lite0 tf_efficientnetv2_b0 mnasnet_050 mixnet_s fbnetc_100 tinynet_e mobilenetv2_100
mobilenetv3_small_050 mobilenetv3_large_100 lcnet_050 mobilenetv4_conv_small mobilenetv4_hybrid_medium hardcorenas_a
ghostnet_100 ghostnetv3_050 repghostnet_050 rexnet_100 starnet_s1 fasternet_t0 repvit_m0_9 mobilevit_xxs mobilevitv2_050
lcnetv2_small
convnext_atto convnext_tiny convnext_tiny.dinov3_lvd1689m convnextv2_atto inception_next_atto mambaout_femto
focalnet_tiny_srf poolformer_s12 poolformerv2_s12 caformer_s18 convformer_s18 convmixer_768_32 edgenext_xx_small
fastvit_t8 efficientformer_l1 efficientformerv2_s0 efficientvit_b0 efficientvit_m0 efficientvim_m1 swiftformer_xs
shvit_s1 iformer_t lowformer_b0 cpubone_nano csatv2
swin_tiny_patch4_window7_224 swin_s3_tiny_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 maxvit_tiny_tf_224
maxvit_rmlp_pico_rw_256 maxxvit_rmlp_nano_rw_256 coatnet_0_224 coatnext_nano_rw_224 hiera_tiny_224 sam2_hiera_tiny
mvitv2_tiny pvt_v2_b0 coat_tiny coat_lite_tiny nextvit_small davit_tiny twins_pcpvt_small twins_svt_small levit_128s
levit_conv_128s tiny_vit_5m_224 gcvit_xxtiny nest_tiny pit_ti_224 visformer_tiny vitamin_small_224 sequencer2d_s
vit_tiny_patch16_224 vit_small_patch32_224 vit_small_patch8_224 vit_small_r26_s32_224 vit_relpos_small_patch16_224
samvit_base_patch16 vit_small_patch14_dinov2 vit_small_patch14_reg4_dinov2 vit_small_patch16_dinov3
vit_pe_core_tiny_patch16_384 vit_base_patch16_siglip_224 naflexvit_base_patch16_gap eva02_tiny_patch14_224
beit_base_patch16_224 beitv2_base_patch16_224 beit3_base_patch16_224 deit_tiny_patch16_224 deit3_small_patch16_224
cait_xxs24_224 xcit_nano_12_p8_224 xcit_nano_12_p16_224 convit_tiny volo_d1_224 tnt_s_patch16_224 crossvit_tiny_240
mixer_s16_224 mixer_s32_224 resmlp_12_224 gmlp_ti16_224 gmixer_24_224
"""
NAMES = LISTED.split()

HEAD = """# What goes together

Which networks of timm are encoders, how, and with which decoders and norms. `ssl-seg models` prints this table,
`ssl-seg models 'maxvit*'` looks at any of timm's networks that are called so, whether they are here or not.

Written by `{command}` on {day}, with timm {timm}, torch {torch} and segmentation_models_pytorch {smp}:
{count} of timm's networks, in {families} of its files. {states}

- *maps*: channels at strides 2, 4, 8, 16 and 32; 0 where there is none.
- *dilates*: to output stride 16, as `deeplabv3plus` wants it. The others take it with `encoder_stride: 32`.
- *norms*: *all* where the encoder has batch norm, which every word of `model.norm` converts. *decoder's* where its
  norms are others: they stay, the decoder's batch norm alone is converted, and `frozen` is refused in one line, as is
  any word but `keep` with `fpn`, which has none.
- *weights*: whether timm's registry has some of ImageNet, or else a tag of others; *package*: `pretrained: package`
  needs no hub. The sizes of timm's images do not matter, but for networks that see the image resized.

Decoders: {decoders} take all five maps. {refusing}
"""

ADAPTED = """## Adapted

By means that ask for no family. What a network gives is kept to the bit; what it lacks is added, and learns from random
weights.

- A network that has one stride, or lacks a few, gets a [pyramid](models.md#encoders): what is finer by transposed
  convolutions, what is coarser by max pooling. A map of stride 64 is upsampled and joins that of stride 32.
- Patches of 7 or 14 pixels: the image is resized, so that each shows 8 or 16 of the image's.
- A network that knows one size alone sees the image resized to it, and its maps are resized back: a large image loses
  detail, and one of another shape is distorted. `options: {img_size: 448}` gives it another size, where timm's
  constructor takes that.
- A map that would have half a row at a multiple of 32: images are padded to multiples of 64.
- Windows that divide an image of its own size alone: the image is resized to the nearest multiples of that.
- Convolutions that pad nothing: the network sees a border of 32 pixels more, and its maps are cut to the image.

| encoder | family | M | maps | dilates | norms | weights | how |
|---|---|---|---|---|---|---|---|
"""

SUPPORTED = """## As they are

| encoder | family | M | maps | dilates | norms | weights |
|---|---|---|---|---|---|---|
"""

REFUSED = """## Refused

| encoder | family | why, and what to take |
|---|---|---|
"""


def page(rows: Sequence[Support], day: str) -> str:
    """docs/support.md from the rows of the table."""
    by_state = {state: [row for row in rows if row.state == state] for state in ("supported", "adapted", "refused")}
    counts = Counter(row.state for row in rows)
    states = f"{counts['supported']} are taken as they are, {counts['adapted']} adapted, {counts['refused']} refused."
    refusing = {decoder.type: [row for row in rows if decoder.type in row.refused_by.split()] for decoder in GENERAL}
    without = [name for name, refused in refusing.items() if refused]
    for name in without:
        assert all(row.channels.startswith("0 ") for row in refusing[name]), f"{name}: another reason; say it"
    head = HEAD.format(
        command=COMMAND,
        day=day,
        **{name: metadata.version(package) for name, package in VERSIONS.items()},
        count=len(rows),
        families=len({row.family for row in rows}),
        states=states,
        decoders=", ".join(f"`{decoder.type}`" for decoder in GENERAL if decoder.type not in without),
        refusing=" ".join(f"`{name}` wants one at stride 2, and refuses maps that begin with 0." for name in without),
    )
    supported = [f"| {' | '.join(_shown(row))} |" for row in by_state["supported"]]
    adapted = [f"| {' | '.join([*_shown(row), row.how])} |" for row in by_state["adapted"]]
    refused = [f"| `{row.encoder}` | {row.family} | {row.how} |" for row in by_state["refused"]]
    parts = [head, SUPPORTED + "\n".join(supported) + "\n", ADAPTED + "\n".join(adapted) + "\n"]
    if refused:
        parts.append(REFUSED + "\n".join(refused) + "\n")
    return "\n".join(parts)


VERSIONS = {"timm": "timm", "torch": "torch", "smp": "segmentation_models_pytorch"}


def _shown(row: Support) -> list[str]:
    norms = "all" if row.batch_norm == "yes" else "decoder's"
    return [f"`{row.encoder}`", row.family, row.parameters, row.channels, row.dilates, norms, row.weights]


def main() -> None:
    found = []
    for number, name in enumerate(NAMES, start=1):
        found.append(support_of(name))
        print(f"{number} of {len(NAMES)}: {name}: {found[-1].state}", flush=True)
    write(found)
    PAGE.write_text(page(shipped(), date.today().isoformat()))


if __name__ == "__main__":
    main()
