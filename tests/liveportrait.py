"""Stands in for a checkout of LivePortrait: the structure of its decoder, its settings and weights,
with few channels, at the paths that its repository has.
"""

import sys
from pathlib import Path
from types import ModuleType

import torch
import torch.nn as nn
import torch.nn.functional as F
import yaml

HIDDEN = 8  # 128 there
SETTINGS = {
    "upscale": 2,
    "max_features": 32,
    "block_expansion": 2,
    "out_channels": 4,
    "num_down_blocks": 2,
}


class SPADE(nn.Module):
    def __init__(self, norm_nc, label_nc):
        super().__init__()
        self.param_free_norm = nn.InstanceNorm2d(norm_nc)
        self.mlp_shared = nn.Sequential(nn.Conv2d(label_nc, HIDDEN, 3, padding=1), nn.ReLU())
        self.mlp_gamma = nn.Conv2d(HIDDEN, norm_nc, 3, padding=1)
        self.mlp_beta = nn.Conv2d(HIDDEN, norm_nc, 3, padding=1)

    def forward(self, x, segmap):
        hidden = self.mlp_shared(F.interpolate(segmap, size=x.shape[2:], mode="nearest"))
        return self.param_free_norm(x) * (1 + self.mlp_gamma(hidden)) + self.mlp_beta(hidden)


class SPADEResnetBlock(nn.Module):
    def __init__(self, fin, fout, norm_G, label_nc, use_se=False, dilation=1):
        super().__init__()
        middle, self.use_se, self.learned_shortcut = min(fin, fout), use_se, fin != fout
        near = {"padding": dilation, "dilation": dilation}
        convolutions = {
            "conv_0": nn.Conv2d(fin, middle, 3, **near),
            "conv_1": nn.Conv2d(middle, fout, 3, **near),
        }
        if self.learned_shortcut:
            convolutions["conv_s"] = nn.Conv2d(fin, fout, 1, bias=False)
        for name, conv in convolutions.items():
            spectral = "spectral" in norm_G
            setattr(self, name, nn.utils.spectral_norm(conv) if spectral else conv)
        self.norm_0, self.norm_1 = SPADE(fin, label_nc), SPADE(middle, label_nc)
        if self.learned_shortcut:
            self.norm_s = SPADE(fin, label_nc)

    def forward(self, x, seg1):
        beside = self.conv_s(self.norm_s(x, seg1)) if self.learned_shortcut else x
        x = self.conv_0(F.leaky_relu(self.norm_0(x, seg1), 0.2))
        return beside + self.conv_1(F.leaky_relu(self.norm_1(x, seg1), 0.2))


class SPADEDecoder(nn.Module):
    """Features [N, C, H, W], also the condition of every SPADE, to an image of 8 times their size
    (4 times without `upscale`).
    """

    def __init__(
        self, upscale=1, max_features=256, block_expansion=64, out_channels=64, num_down_blocks=2
    ):
        super().__init__()
        features = min(max_features, block_expansion * 2**num_down_blocks)
        self.fc = nn.Conv2d(features, 2 * features, 3, padding=1)
        sizes = {f"G_middle_{number}": (2 * features, 2 * features) for number in range(6)}
        sizes |= {"up_0": (2 * features, features), "up_1": (features, out_channels)}
        for name, size in sizes.items():
            setattr(self, name, SPADEResnetBlock(*size, "spadespectralinstance", features))
        self.up = nn.Upsample(scale_factor=2)
        if upscale > 1:
            conv = nn.Conv2d(out_channels, 3 * 2 * 2, 3, padding=1)
            self.conv_img = nn.Sequential(conv, nn.PixelShuffle(2))
        else:
            self.conv_img = nn.Conv2d(out_channels, 3, 3, padding=1)

    def forward(self, feature):
        x = self.fc(feature)
        for number in range(6):
            x = getattr(self, f"G_middle_{number}")(x, feature)
        x = self.up_0(self.up(x), feature)
        x = self.up_1(self.up(x), feature)
        return torch.sigmoid(self.conv_img(F.leaky_relu(x, 0.2)))


def load_model(ckpt_path, model_config, device, model_type):
    decoder = SPADEDecoder(**model_config["model_params"][f"{model_type}_params"]).to(device)
    decoder.load_state_dict(torch.load(ckpt_path))
    return decoder.eval()


def check_out(folder):
    """Writes settings and weights into a folder, and makes the package `src` importable. Returns
    the names of its modules.
    """
    files = {
        "src/config/models.yaml": lambda path: path.write_text(
            yaml.safe_dump({"model_params": {"spade_generator_params": SETTINGS}})
        ),
        "pretrained_weights/liveportrait/base_models/spade_generator.pth": lambda path: torch.save(
            SPADEDecoder(**SETTINGS).state_dict(), path
        ),
    }
    for name, write in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    names = ("src", "src.utils", "src.utils.helper")
    sys.modules |= {name: ModuleType(name) for name in names}
    sys.modules["src.utils.helper"].load_model = load_model
    return names
