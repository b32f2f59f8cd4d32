"""The viewer: what its server answers and what not, its end, and the page in a headless browser."""

import dataclasses
import http.client
import io
import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from jaxlab.core import DataUnavailable, data, data_path
from jaxlab.flexgaussian import (
    QuantConfig,
    SceneFormatError,
    load_scene,
    metrics,
    orbit_cameras,
    quantize,
    render,
    save_compressed,
    save_scene,
)
from jaxlab.flexgaussian.commands import app
from jaxlab.flexgaussian.compressed import dequantize
from jaxlab.flexgaussian.scene import padded, take
from jaxlab.flexgaussian.viewer import ENGINE, page, serve
from tests.flexgaussian import browser
from tests.flexgaussian.scenes import random_scene, real

GROUND = (0xF4 / 255, 0xF5 / 255, 0xF8 / 255)
WIDTH, HEIGHT = 256, 192  # as `orbit_cameras` has them, so that all renders share a program


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A scene, its compressed file, and a stand-in of the engine."""
    made = tmp_path_factory.mktemp("viewer")
    scene = random_scene(30, degree=1)
    save_scene(made / "a.ply", scene)
    save_compressed(made / "b<i>.jxg", quantize(take(scene, slice(25)), QuantConfig()))
    (made / "engine.mjs").write_text("export const nothing = 0;")
    return made


@pytest.fixture(scope="module")
def server(folder):
    with serve(folder / "a.ply", folder / "b<i>.jxg", viewer_js=folder / "engine.mjs") as url:
        yield int(url.rstrip("/").rsplit(":", 1)[1])


def ask(port, path, method="GET", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, answer.headers, content


def likeness(before, after):
    """Mean PSNR over the default orbit."""
    after = padded(after, before.num_gaussians)
    ratios = [metrics.psnr(np.asarray(render(after, c)), np.asarray(render(before, c))) for c in orbit_cameras(before)]
    return np.mean(ratios)


def views(scene):
    """The default orbit, as much further away as the page begins."""
    cameras = orbit_cameras(scene)
    middle = np.mean([camera.center for camera in orbit_cameras(scene, elevation=0)], axis=0)
    away = 0.25 * np.linalg.norm(cameras[0].center - middle)
    back = np.zeros((4, 4), np.float32)
    back[2, 3] = away
    return [dataclasses.replace(camera, viewmat=camera.viewmat + back) for camera in cameras]


def test_what_is_served(server, folder, tmp_path):
    status, headers, content = ask(server, "/")
    assert (status, headers["content-type"], headers["cache-control"]) == (200, "text/html; charset=utf-8", "no-store")
    assert "connect-src 'self'" in headers["content-security-policy"]
    assert content.decode() == page("a.ply")
    assert ask(server, "/", "HEAD")[1]["content-length"] == str(len(content))
    status, headers, content = ask(server, "/playcanvas.mjs")
    assert (headers["content-type"], content) == ("text/javascript", (folder / "engine.mjs").read_bytes())

    before = load_scene(folder / "a.ply")
    after = dequantize(quantize(take(before, slice(25)), QuantConfig()))
    for role, scene in (("original", before), ("compressed", after)):
        (tmp_path / "got.ply").write_bytes(ask(server, f"/{role}.ply")[2])
        got = load_scene(tmp_path / "got.ply")
        np.testing.assert_array_equal(got.shN, scene.shN)
        np.testing.assert_array_equal(got.means, scene.means)

    about = json.loads(ask(server, "/about.json")[2])
    camera = views(before)[0]
    up = np.radians(about["elevation"])
    stands = np.array(about["target"]) + about["distance"] * np.array([0, -np.sin(up), -np.cos(up)])
    np.testing.assert_allclose(stands, camera.center, rtol=1e-4, atol=1e-4)
    assert np.tan(np.radians(about["fov"]) / 2) == pytest.approx(camera.height / 2 / camera.fy)
    first, second = about["scenes"]
    size = (folder / "b<i>.jxg").stat().st_size
    assert (first["name"], first["num_gaussians"], first["degree"], first["times_less"]) == ("a.ply", 30, 1, None)
    assert (second["name"], second["num_gaussians"], second["bytes"]) == ("b<i>.jxg", 25, size)
    assert second["times_less"] == pytest.approx(4 * (14 + 9) * 30 / size)

    quality = json.loads(ask(server, "/quality.json")[2])
    assert (quality["psnr"], quality["views"]) == (pytest.approx(likeness(before, after), abs=1e-3), 8)


@pytest.mark.parametrize(
    "path",
    ["/../a.ply", "/%2e%2e/a.ply", "//etc/passwd", "/etc/passwd", "/original.ply/../a.ply", "/a.ply", "/viewer.py"]
    + ["/_viewer.js", "a.ply", "*", "/original.PLY", "/?/etc/passwd"],
)
def test_nothing_else_is_served(server, path):
    status, _, content = ask(server, path)
    assert status == 404
    assert len(content) < 1000


def test_who_may_ask(server):
    assert ask(server, "/about.json", Host=f"localhost:{server}")[0] == 200
    assert ask(server, "/about.json", Host="[::1]")[0] == 200
    for host in ("evil.example", "localhost.evil.example:80", "evil.example:localhost", ""):
        assert ask(server, "/about.json", Host=host)[0] == 421
    for method in ("POST", "PUT", "DELETE"):
        assert ask(server, "/about.json", method)[0] == 501


def test_one_scene(folder):
    with serve(load_scene(folder / "a.ply"), viewer_js=folder / "engine.mjs") as url:
        port = int(url.rstrip("/").rsplit(":", 1)[1])
        (only,) = json.loads(ask(port, "/about.json")[2])["scenes"]
        assert (only["role"], only["name"], only["bytes"]) == ("original", "in memory", 30 * 4 * 23)
        assert [ask(port, path)[0] for path in ("/original.ply", "/compressed.ply", "/quality.json")] == [200, 404, 404]
    with pytest.raises(ConnectionRefusedError):
        ask(port, "/")


def test_wrong_files_and_ports(folder, server, tmp_path, monkeypatch):
    engine = {"viewer_js": folder / "engine.mjs"}
    (tmp_path / "text.ply").write_text("not a scene")
    cut = tmp_path / "cut.jxg"
    cut.write_bytes((folder / "b<i>.jxg").read_bytes()[:-9])
    for original, compressed, error, match in [
        ("absent.ply", None, FileNotFoundError, "absent.ply"),
        (tmp_path / "text.ply", None, SceneFormatError, "text.ply: expected"),
        (folder / "a.ply", cut, SceneFormatError, "cut.jxg: stream"),
    ]:
        with pytest.raises(error, match=match), serve(original, compressed, **engine):
            pass
    for port, match in ((server, f"port: {server} is not to be had"), (-1, "0 to 65535"), (1 << 16, "0 to 65535")):
        with pytest.raises(ValueError, match=match), serve(folder / "a.ply", port=port, **engine):
            pass
    with pytest.raises(FileNotFoundError, match="viewer_js"), serve(folder / "a.ply", viewer_js=tmp_path):
        pass

    def offline(file):
        raise OSError("no network")

    monkeypatch.setattr(data, "_places", lambda: [("cache", tmp_path)])
    monkeypatch.setattr(data, "_download", offline)
    with (
        pytest.raises(DataUnavailable, match=r"(?s)no network.*npm pack playcanvas@.*--viewer-js"),
        serve(folder / "a.ply"),
    ):
        pass
    result = CliRunner().invoke(app, ["view", "absent.ply", "--viewer-js", str(folder / "engine.mjs")])
    assert (result.exit_code, "absent.ply" in result.output) == (2, True)


def test_the_page_is_whole():
    text = page("a<b>")
    assert "<title>a&lt;b&gt; &middot; jaxlab</title>" in text
    assert "http://" not in text
    assert "https://" not in text
    assert "/* css */" not in text
    assert "/* script */" not in text


def test_the_command_ends_with_ctrl_c(folder):
    command = [sys.executable, "-m", "jaxlab", "flexgaussian", "view", folder / "a.ply", "--no-browser"]
    command += ["--viewer-js", folder / "engine.mjs"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # What runs in the background of a shell ignores SIGINT, and so would what it starts.
    with subprocess.Popen(command, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **pipes) as process:
        url = process.stdout.readline().split()[0]
        port = int(url.rstrip("/").rsplit(":", 1)[1])
        assert ask(port, "/about.json")[0] == 200
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=60)
        assert (process.returncode, *rest) == (0, "", "")


@pytest.mark.skipif(browser.PROGRAM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("engine", ["export const nothing = 0;", "no script"])
def test_the_page_tells_what_failed(folder, tmp_path, engine):
    (tmp_path / "engine.mjs").write_text(engine)
    with (
        serve(folder / "a.ply", viewer_js=tmp_path / "engine.mjs") as url,
        browser.browser(tmp_path, WIDTH, HEIGHT) as shown,
    ):
        shown.open(url, "document.body?.dataset.state === 'failed'")
        assert shown.value("document.getElementById('message').textContent").startswith("Nothing to see: ")


@pytest.fixture(scope="module")
def robot(tmp_path_factory):
    """A page on the robot as it is and with a fifth of its Gaussians gone, and both scenes."""
    if browser.PROGRAM is None:
        pytest.skip("no Chromium is installed")
    try:
        data_path(ENGINE, download=False)
    except DataUnavailable as error:
        pytest.skip(str(error))
    path = real("playbot_lod6.sog")
    scene = load_scene(path)
    compressed = quantize(take(scene, np.arange(scene.num_gaussians) % 5 > 0), QuantConfig())
    with (
        serve(path, compressed) as url,
        browser.browser(tmp_path_factory.mktemp("browser"), WIDTH, HEIGHT) as shown,
    ):
        shown.open(url, "!['loading', undefined].includes(document.body?.dataset.state)")
        assert shown.value("document.body.dataset.state") == "ready", shown.value("document.body.innerText")
        yield shown, scene, dequantize(compressed)


def picture(shown):
    """What the canvases show, without what lies over them."""
    bare = "{ id: 'bare', textContent: '.card, nav, #divider { opacity:0 }' }"
    shown.value(f"void document.head.append(Object.assign(document.createElement('style'), {bare}))")
    shown.until("document.getElementById('stage').getAttribute('aria-busy') === 'false'")
    image = np.asarray(Image.open(io.BytesIO(shown.screenshot())).convert("RGB"), np.float32) / 255
    shown.value("document.getElementById('bare').remove()")
    return image


def press(shown, where, *keys):
    shown.value(f"document.getElementById('{where}').focus()")
    for key in keys:
        shown.key(key)


def attribute(shown, where, name):
    return shown.value(f"document.getElementById('{where}').getAttribute('{name}')")


def test_the_browser_shows_what_the_rasteriser_draws(robot):
    shown, before, after = robot
    scenes = {"End": before, "Home": padded(after, before.num_gaussians)}
    for step, keys in ((0, 0), (1, 9)):  # nine times five degrees
        press(shown, "stage", *["ArrowRight"] * keys)
        camera = views(before)[step]
        drawn = {key: np.asarray(render(scene, camera, GROUND)) for key, scene in scenes.items()}
        for key, other in (("End", "Home"), ("Home", "End")):
            press(shown, "divider", key)
            got = picture(shown)
            like = {name: metrics.psnr(got, image) for name, image in drawn.items()}
            assert like[key] > 34, (step, like)  # the engine sorts coarsely and cuts Gaussians off earlier
            assert like[key] > like[other] + 3, (step, like)
    shown.click("#reset")
    assert shown.errors == []


def test_the_divider(robot):
    shown, *_ = robot
    press(shown, "divider", "Home", "ArrowRight", "ArrowRight", "ArrowLeft")
    assert attribute(shown, "divider", "aria-valuenow") == "2"
    press(shown, "divider", "End")
    left = picture(shown)
    press(shown, "divider", "Home")
    right = picture(shown)
    column = round(WIDTH * 0.45)
    shown.mouse("mousePressed", 3, HEIGHT / 2)
    shown.mouse("mouseMoved", WIDTH * 0.3, HEIGHT / 2)
    shown.mouse("mouseMoved", column, HEIGHT / 2)
    shown.mouse("mouseReleased", column, HEIGHT / 2, 0)
    assert attribute(shown, "divider", "aria-valuenow") == "45"
    both = picture(shown)
    np.testing.assert_array_equal(both[:, : column - 1], left[:, : column - 1])
    np.testing.assert_array_equal(both[:, column + 1 :], right[:, column + 1 :])
    assert np.abs(left - right).max() > 0.2


def test_labels_buttons_and_themes(robot):
    shown, before, after = robot
    shown.until("document.getElementById('quality')?.textContent.includes('dB')")
    text = shown.value("document.body.textContent")
    for told in ("1,873 Gaussians, harmonics of degree 2", "1,498 Gaussians", "playbot_lod6.sog", "65 kB"):
        assert told in text
    assert f"{likeness(before, after):.1f} dB against the original, 8 views" in text
    still = picture(shown)
    shown.click("#turntable")
    assert attribute(shown, "turntable", "aria-pressed") == "true"
    shown.value("new Promise(done => setTimeout(done, 500))")
    shown.click("#turntable")
    moved = picture(shown)
    assert metrics.psnr(moved, still) < 25
    np.testing.assert_array_equal(picture(shown), moved)
    shown.click("#theme")
    assert picture(shown)[5, 5].max() < 0.15
    shown.click("#theme")
    shown.click("#reset")
    np.testing.assert_array_equal(picture(shown), still)
    assert shown.errors == []
