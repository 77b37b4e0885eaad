"""Discriminators equal encodec's module, and plain torch written from the papers and public configs for the others."""

import dataclasses
import math

import encodec_peer
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional

from jaxaudio.nn.discriminator_config import (
    PRESETS,
    DiscriminatorConfig,
    MultiBandConfig,
    MultiScaleSTFTConfig,
    PeriodConfig,
    ResidualSTFTConfig,
    ScaleConfig,
)
from jaxaudio.nn.discriminators import Discriminators

torch.set_num_threads(1)
RNG = np.random.default_rng(0)
SMALL_SCALES = ScaleConfig(features=4, max_features=16, groups=(1, 4, 4, 4))
SMALL_RESIDUAL = ResidualSTFTConfig(win_length=128, hop_length=32, features=4)
SMALL_PERIODS = PeriodConfig(periods=(2, 5), features=(3, 4, 4))
SMALL_BANDS = MultiBandConfig(win_lengths=(128, 64), features=3)


def noise(*shape):
    return (0.3 * RNG.standard_normal(shape)).astype(np.float32)


def random_params(config, num_samples=2048):
    """The tree of the config's parameters, all random: initial magnitudes and zero biases would hide mistakes."""
    shapes = jax.eval_shape(Discriminators(config).init, jax.random.key(0), jnp.zeros((1, num_samples, 1)))["params"]
    shapes = jax.tree.map(lambda box: box.value.shape, shapes, is_leaf=lambda x: hasattr(x, "names"))
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda shape: RNG.standard_normal(shape).astype(np.float32), shapes, is_leaf=is_shape)


def apply(config, params, waveform):
    return jax.jit(Discriminators(config).apply)({"params": params}, jnp.asarray(waveform))


def num_params(config):
    shapes = jax.eval_shape(Discriminators(config).init, jax.random.key(0), jnp.zeros((1, 8192, 1)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def assert_equal(ours, theirs):
    """Networks' (logits without channels, feature_maps), ours channels last and theirs channels first."""
    assert len(ours) == len(theirs)
    for (logits, maps), (their_logits, their_maps) in zip(ours, theirs, strict=True):
        assert len(maps) == len(their_maps)
        their_maps = [their_logits] + [x.movedim(1, -1) for x in their_maps]
        for array, tensor in zip([logits, *maps], their_maps, strict=True):
            scale = float(tensor.abs().max())
            np.testing.assert_allclose(array, tensor.detach().numpy(), rtol=1e-4, atol=1e-4 * scale)


def kernel_of(layer):
    """torch's layout (O, I, ...) of one of our kernels, the norm taken in numpy."""
    kernel = layer.get("kernel")
    if kernel is None:
        direction = np.asarray(layer["direction"], np.float64)
        norms = np.sqrt((direction.reshape(-1, direction.shape[-1]) ** 2).sum(axis=0))
        kernel = (direction * (layer["magnitude"] / norms)).astype(np.float32)
    return torch.from_numpy(np.moveaxis(kernel, (-1, -2), (0, 1)).copy())


def conv(layer, x, **options):
    function = functional.conv1d if x.ndim == 3 else functional.conv2d
    return function(x, kernel_of(layer), torch.from_numpy(layer["bias"]), **options)


def their_spectrogram(rows, win_length, hop_length):
    """(rows, 2, T, F), of mirrored rows: the centre of frame t is (t + 1/2) * hop_length."""
    margin = (win_length - hop_length) // 2
    right = margin + math.ceil(rows.shape[1] / hop_length) * hop_length - rows.shape[1]
    rows = functional.pad(rows[:, None], (margin, right), mode="reflect")[:, 0]
    window = torch.hann_window(win_length, periodic=True)
    spectrum = torch.stft(rows, win_length, hop_length, window=window, center=False, return_complex=True)
    return torch.view_as_real(spectrum).permute(0, 3, 2, 1)


@pytest.mark.parametrize(
    "config",
    [
        MultiScaleSTFTConfig(win_lengths=(256, 64), features=4),
        MultiScaleSTFTConfig(win_lengths=(128,), features=3, kernel_size=(3, 8), dilations=(1, 2), negative_slope=0.3),
    ],
)
def test_stft_networks_equal_encodecs(config):
    encodec = encodec_peer.encodec_package()
    torch.manual_seed(0)
    theirs = encodec.msstftd.MultiScaleSTFTDiscriminator(
        config.features,
        n_ffts=list(config.win_lengths),
        hop_lengths=[win_length // 4 for win_length in config.win_lengths],
        win_lengths=list(config.win_lengths),
        kernel_size=config.kernel_size,
        dilations=list(config.dilations),
        activation_params={"negative_slope": config.negative_slope},
    )
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    params = {}
    for win_length, network in zip(config.win_lengths, theirs.discriminators, strict=True):
        state = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
        first = {"kernel": state["convs.0.conv.weight"].transpose(2, 3, 1, 0), "bias": state["convs.0.conv.bias"]}
        layers = {"conv_0": first}
        names = {f"conv_{index}": f"convs.{index}" for index in range(1, len(network.convs))}
        for ours, name in (names | {"conv_out": "conv_post"}).items():
            layers[ours] = {
                "direction": state[f"{name}.conv.weight_v"].transpose(2, 3, 1, 0),
                "magnitude": state[f"{name}.conv.weight_g"].reshape(-1),
                "bias": state[f"{name}.conv.bias"],
            }
        params[f"stft_{win_length}"] = layers
    waveform = noise(2, 1111, 1)
    outputs = apply(DiscriminatorConfig(multi_scale_stft=config), params, waveform)
    with torch.no_grad():
        logits, maps = theirs(torch.from_numpy(waveform.swapaxes(1, 2)))
    assert_equal(outputs, [(x[:, 0], y) for x, y in zip(logits, maps, strict=True)])


def picture_conv(layer, x, **options):
    return functional.conv2d(x, kernel_of(layer)[..., None], torch.from_numpy(layer["bias"]), **options)


def their_period(config, period, layers, rows):
    missing = period - rows.shape[1] % period
    if not config.always_pad:
        missing %= period
    x = functional.pad(rows[:, None], (0, missing), mode="reflect")
    x = x.reshape(x.shape[0], 1, -1, period)  # their pictures are of time by period, ours of period by time
    maps = []
    for index in range(len(config.features)):
        stride = 3 if index < len(config.features) - 1 else 1
        x = functional.leaky_relu(picture_conv(layers[f"conv_{index}"], x, stride=(stride, 1), padding=(2, 0)), 0.1)
        maps.append(x.swapaxes(2, 3))
    return picture_conv(layers["conv_out"], x, padding=(1, 0))[:, 0].swapaxes(1, 2), maps


def their_bands(config, win_length, layers, rows):
    spectrogram = their_spectrogram(rows, win_length, win_length // 4)
    maps, bands = [], []
    for band, (low, high) in enumerate(config.bands):
        x = spectrogram[..., int(low * spectrogram.shape[-1]) : int(high * spectrogram.shape[-1])]
        for index in range(5):
            stride, padding = (1, 2 if 0 < index < 4 else 1), (1, 4 if index < 4 else 1)
            layer = layers[f"band_{band}_conv_{index}"]
            x = functional.leaky_relu(conv(layer, x, stride=stride, padding=padding), 0.1)
            maps.append(x)
        bands.append(x)
    return conv(layers["conv_out"], torch.cat(bands, dim=-1), padding=1)[:, 0], maps


@pytest.mark.parametrize("num_samples", [750, 801])
def test_dacs_networks_equal_plain_torch(num_samples):
    config = DiscriminatorConfig(periods=SMALL_PERIODS, multi_band=SMALL_BANDS, normalize=True)
    params, waveform = random_params(config), noise(2, num_samples, 1) + 0.1
    rows = torch.from_numpy(waveform[..., 0])
    rows = rows - rows.mean(dim=1, keepdim=True)
    rows = 0.8 * rows / (rows.abs().amax(dim=1, keepdim=True) + 1e-9)
    theirs = [their_period(config.periods, p, params[f"period_{p}"], rows) for p in config.periods.periods]
    theirs += [their_bands(config.multi_band, w, params[f"band_{w}"], rows) for w in config.multi_band.win_lengths]
    ours = apply(config, params, waveform)
    assert_equal(ours, theirs)
    # A frame for every hop; a whole period more than the samples need, when they are whole periods.
    assert ours[2][0].shape[1] == math.ceil(num_samples / 32)
    assert ours[0][1][0].shape[1:3] == (2, math.ceil((num_samples // 2 + 1) / 3))


def test_periods_are_padded_only_if_broken_where_others_than_dac_do_so():
    config = DiscriminatorConfig(periods=dataclasses.replace(SMALL_PERIODS, always_pad=False))
    params, waveform = random_params(config), noise(2, 750, 1)
    rows = torch.from_numpy(waveform[..., 0])
    assert_equal(
        apply(config, params, waveform), [their_period(config.periods, p, params[f"period_{p}"], rows) for p in (2, 5)]
    )


def their_scale(config, downsampling, layers, rows):
    x = rows[:, None]
    for _ in range(int(math.log2(downsampling))):
        x = functional.avg_pool1d(x, 4, 2, padding=1, count_include_pad=False)
    x = functional.pad(x, (7, 7), mode="reflect")
    maps = []
    for index in range(6):
        strided = 0 < index < 5
        x = conv(
            layers[f"conv_{index}"],
            x,
            stride=4 if strided else 1,
            padding=20 if strided else 2 if index else 0,
            groups=config.groups[index - 1] if strided else 1,
        )
        x = functional.leaky_relu(x, 0.2)
        maps.append(x)
    return conv(layers["conv_out"], x, padding=1)[:, 0], maps


def their_residual(layers, rows):
    leaky = lambda x: functional.leaky_relu(x, 0.2)  # noqa: E731
    x = conv(layers["conv_in"], their_spectrogram(rows, 128, 32)[..., :64], padding=3)
    maps = [x]
    for block in range(6):
        inner = conv(layers[f"block_{block}_conv_1"], leaky(x), padding=1)
        stride = (2, 2) if block % 2 else (1, 2)
        odd = block % 2 * x.shape[2] % 2  # a row more at the end, so that no frame is lost
        outer = functional.pad(leaky(inner), (1, 1, 1, 1 + odd))
        x = conv(layers[f"block_{block}_conv_2"], outer, stride=stride) + conv(
            layers[f"block_{block}_shortcut"], x, stride=stride
        )
        maps += [inner, x]
    return conv(layers["conv_out"], leaky(x))[:, 0, :, 0], maps


@pytest.mark.parametrize("num_samples", [1024, 1300])
def test_soundstreams_networks_equal_plain_torch(num_samples):
    config = DiscriminatorConfig(scales=SMALL_SCALES, residual_stft=SMALL_RESIDUAL)
    params, waveform = random_params(config), noise(2, num_samples, 1)
    rows = torch.from_numpy(waveform[..., 0])
    theirs = [their_scale(config.scales, 2**index, params[f"scale_{index}"], rows) for index in range(3)]
    theirs.append(their_residual(params["residual_stft"], rows))
    assert_equal(apply(config, params, waveform), theirs)


def test_soundstreams_shapes_are_the_papers():
    num_samples = 256 * 8 * 3
    shapes = jax.eval_shape(
        lambda key, x: Discriminators(PRESETS["soundstream"]).init_with_output(key, x)[0],
        jax.random.key(0),
        jnp.zeros((2, num_samples, 1)),
    )
    logits, maps = shapes[-1]
    assert logits.shape == (2, num_samples // (256 * 8))
    assert maps[-1].shape == (2, num_samples // (256 * 8), 512 // 64, 512)
    assert [maps[index].shape[-1] for index in range(2, 13, 2)] == [64, 128, 128, 256, 256, 512]
    for index, (logits, maps) in enumerate(shapes[:3]):
        assert logits.shape == (2, num_samples // 2**index // 256)
        assert [x.shape[-1] for x in maps] == [16, 64, 256, 1024, 1024, 1024]


def test_a_waveform_logit_hears_its_receptive_field():
    # 15 samples, four times 40 more at distances of 1, 4, 16 and 64, then 4 + 2 more at distances of 256.
    reach = 15 + 40 * (1 + 4 + 16 + 64) + 6 * 256
    config = DiscriminatorConfig(scales=dataclasses.replace(SMALL_SCALES, downsampling=(1,)))
    params = random_params(config)

    def middle_logit(waveform):
        ((logits, _),) = Discriminators(config).apply({"params": params}, waveform)
        return logits[0, logits.shape[1] // 2]

    heard = np.flatnonzero(jax.jit(jax.grad(middle_logit))(jnp.asarray(noise(1, 12_288, 1)))[0, :, 0])
    assert heard[-1] - heard[0] + 1 == reach


def test_sizes_are_the_public_ones():
    five_scales = DiscriminatorConfig(multi_scale_stft=MultiScaleSTFTConfig())
    assert num_params(five_scales) == num_params(PRESETS["audiocraft"]) == 472_330
    periods = DiscriminatorConfig(periods=PeriodConfig(periods=(2,)))
    bands = DiscriminatorConfig(multi_band=MultiBandConfig(win_lengths=(512,)))
    total = num_params(PRESETS["dac"])
    assert total == 5 * num_params(periods) + 3 * num_params(bands)
    assert [round(n / 1e6, 2) for n in (total, num_params(periods), num_params(bands))] == [42.52, 8.22, 0.47]


def test_channels_are_judged_one_by_one_and_every_parameter_learns():
    config = DiscriminatorConfig(
        scales=ScaleConfig(downsampling=(2,), features=2, max_features=4, strides=(2,), groups=(1,)),
        periods=dataclasses.replace(SMALL_PERIODS, periods=(3,), features=(2,)),
        residual_stft=dataclasses.replace(SMALL_RESIDUAL, win_length=64, multipliers=(2,), strides=((2, 2),)),
        multi_scale_stft=MultiScaleSTFTConfig(win_lengths=(64,), features=2, dilations=(2,)),
        multi_band=MultiBandConfig(win_lengths=(64,), features=2, bands=((0.0, 0.4), (0.4, 1.0)), num_strided=1),
        normalize=True,
    )
    params, waveform = random_params(config, 300), jnp.asarray(noise(2, 300, 2))

    def loss(params, waveform):
        outputs = Discriminators(config).apply({"params": params}, waveform)
        return sum(jnp.mean(logits**2) for logits, _ in outputs), outputs

    gradients, both = jax.jit(jax.grad(loss, has_aux=True))(params, waveform)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert 0 < np.abs(gradient).max() < np.inf, jax.tree_util.keystr(path)
    alone = apply(config, params, jnp.swapaxes(waveform, 1, 2).reshape(4, 300, 1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(a).max()), both, alone)


def test_initial_kernels_are_the_directions():
    config = DiscriminatorConfig(periods=dataclasses.replace(SMALL_PERIODS, periods=(2,)))
    params = jax.jit(Discriminators(config).init)(jax.random.key(1), jnp.zeros((1, 64, 1)))["params"]
    layer = jax.tree.map(lambda box: np.asarray(box.value), params, is_leaf=lambda x: hasattr(x, "names"))
    layer = layer["period_2"]["conv_1"]
    np.testing.assert_allclose(kernel_of(layer), np.moveaxis(layer["direction"], (-1, -2), (0, 1)), rtol=1e-5)
    bound = (5 * 3) ** -0.5
    assert 0.8 * bound < np.abs(layer["direction"]).max() <= bound


def test_too_short_a_waveform_is_refused():
    config = DiscriminatorConfig(multi_scale_stft=MultiScaleSTFTConfig(win_lengths=(64,), features=2))
    with pytest.raises(ValueError, match="at least frame_length = 64 samples .* got 63 samples"):
        Discriminators(config).init(jax.random.key(0), jnp.zeros((1, 63, 1)))


def test_resolutions_that_halving_does_not_reach_are_refused():
    with pytest.raises(ValueError, match=r"power of 2, got \(1, 3\)"):
        ScaleConfig(downsampling=(1, 3))
