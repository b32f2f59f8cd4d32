// One canvas a scene, one over the other, seen from the same place; the upper one, the original, is clipped at the divider.
let pc;  // the engine

const TURN_DEGREES_PER_S = 24;
const KEY_DEGREES = 5, KEY_ZOOM = 1.1, KEY_SHARE = 2;
const root = document.documentElement, stage = document.getElementById("stage"), divider = document.getElementById("divider");
const turntable = document.getElementById("turntable"), theme = document.getElementById("theme");

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function tell(state, text) {
  document.getElementById("message").textContent = text;
  document.body.dataset.state = state;
}

function size(bytes) {
  const [unit, one] = bytes >= 1e9 ? ["GB", 1e9] : bytes >= 1e6 ? ["MB", 1e6] : ["kB", 1e3];
  return `${Number((bytes / one).toPrecision(3))} ${unit}`;
}

// A scene in a canvas of its own. It is drawn when something has changed, not all the time.
class Pane {
  static async open(file, fov) {
    const pane = new Pane();
    pane.canvas = element("canvas");
    stage.prepend(pane.canvas);  // the first is the uppermost
    const device = await pc.createGraphicsDevice(pane.canvas, { deviceTypes: ["webgl2"], antialias: false }).catch(
      () => { throw new Error("this browser has no WebGL 2, or its graphics are switched off"); });
    device.maxPixelRatio = Math.min(window.devicePixelRatio, 2);
    const options = new pc.AppOptions();
    options.graphicsDevice = device;
    options.componentSystems = [pc.CameraComponentSystem, pc.GSplatComponentSystem];
    options.resourceHandlers = [pc.GSplatHandler];
    const app = pane.app = new pc.AppBase(pane.canvas);
    app.init(options);
    app.setCanvasFillMode(pc.FILLMODE_NONE);
    app.setCanvasResolution(pc.RESOLUTION_AUTO);
    app.autoRender = false;
    app.systems.gsplat.on("frame:request", () => { app.renderNextFrame = true; });
    app.systems.gsplat.on("frame:ready", (camera, layer, ready) => pane.drew(ready));
    // As the paper draws: Gaussians are blurred by 0.3 pixels squared (the engine measures in half pixels), none is too
    // small or too faint, and colours follow every movement.
    const chunks = pc.ShaderChunks.get(device, pc.SHADERLANGUAGE_GLSL);
    chunks.set("gsplatCornerVS", chunks.get("gsplatCornerVS").replaceAll("+ 0.3", "+ 1.2"));
    Object.assign(app.scene.gsplat, { minPixelSize: 0, minContribution: 0, colorUpdateAngle: 0, dataFormat: pc.GSPLATDATA_LARGE });
    pane.camera = new pc.Entity("camera");
    pane.camera.addComponent("camera", { fov, toneMapping: pc.TONEMAP_NONE });
    app.root.addChild(pane.camera);
    app.start();
    const asset = new pc.Asset(file, "gsplat", { url: file });
    await new Promise((loaded, failed) => {
      asset.once("load", loaded);
      asset.once("error", error => failed(new Error(`${file}: ${error}`)));
      app.assets.add(asset);
      app.assets.load(asset);
    });
    const splats = new pc.Entity("splats");
    splats.addComponent("gsplat", { asset });
    splats.setLocalEulerAngles(180, 0, 0);  // y is down in the file, up here
    app.root.addChild(splats);
    return pane;
  }

  place({ yaw, pitch, distance, target }, background) {
    const turn = new pc.Quat().setFromEulerAngles(-pitch, yaw, 0);
    const back = turn.transformVector(new pc.Vec3(0, 0, distance));
    this.camera.setLocalRotation(turn);
    this.camera.setLocalPosition(target.clone().add(back));
    const lens = this.camera.camera;
    lens.horizontalFov = this.canvas.clientWidth < this.canvas.clientHeight;
    lens.nearClip = distance / 100;
    lens.farClip = distance * 100;
    lens.clearColor = background;
    this.drew(false);
  }

  // After a frame: were the Gaussians sorted for this place, or is another one needed?
  drew(sorted) {
    this.sorted = sorted;
    if (!sorted) this.app.renderNextFrame = true;
    stage.setAttribute("aria-busy", !settled());
  }
}

const scenes = { panes: [], home: null, view: null, share: 50 };

function settled() {
  return scenes.panes.every(pane => pane.sorted);
}

function redraw() {
  const background = new pc.Color().fromString(getComputedStyle(root).getPropertyValue("--ground").trim());
  for (const pane of scenes.panes) pane.place(scenes.view, background);
}

function turn(yaw, pitch) {
  scenes.view.yaw = (scenes.view.yaw + yaw) % 360;
  scenes.view.pitch = Math.min(Math.max(scenes.view.pitch + pitch, -89), 89);
  redraw();
}

function zoom(factor) {
  const far = scenes.home.distance;
  scenes.view.distance = Math.min(Math.max(scenes.view.distance * factor, far / 50), far * 20);
  redraw();
}

function pan(x, y) {
  const camera = scenes.panes[0].camera, step = scenes.view.distance / stage.clientHeight;
  scenes.view.target.add(camera.right.clone().mulScalar(-x * step)).add(camera.up.clone().mulScalar(y * step));
  redraw();
}

function reset() {
  scenes.view = { ...scenes.home, target: scenes.home.target.clone() };
  redraw();
}

function split(share) {
  scenes.share = Math.min(Math.max(share, 0), 100);
  divider.style.left = `${scenes.share}%`;
  divider.setAttribute("aria-valuenow", Math.round(scenes.share));
  divider.setAttribute("aria-valuetext", `original: the left ${Math.round(scenes.share)} %`);
  scenes.panes[0].canvas.style.clipPath = `inset(0 ${100 - scenes.share}% 0 0)`;
}

function dress(dark) {
  root.dataset.theme = dark ? "dark" : "light";
  theme.setAttribute("aria-pressed", dark);
  if (scenes.view) redraw();
}

function listen() {
  const fingers = new Map();
  let spread = 0;
  stage.addEventListener("pointerdown", event => {
    fingers.set(event.pointerId, event);
    stage.setPointerCapture(event.pointerId);
    spread = 0;
  });
  stage.addEventListener("pointermove", event => {
    const before = fingers.get(event.pointerId);
    if (!before) return;
    const x = event.clientX - before.clientX, y = event.clientY - before.clientY;
    fingers.set(event.pointerId, event);
    if (fingers.size === 2) {
      const [a, b] = fingers.values(), now = Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY);
      if (spread && now) zoom(spread / now);
      spread = now;
      pan(x / 2, y / 2);
    } else if (event.shiftKey || event.buttons !== 1) pan(x, y);
    else turn(-x * 0.4, y * 0.4);
  });
  for (const kind of ["pointerup", "pointercancel"]) stage.addEventListener(kind, event => fingers.delete(event.pointerId));
  stage.addEventListener("contextmenu", event => event.preventDefault());
  stage.addEventListener("wheel", event => { event.preventDefault(); zoom(Math.exp(event.deltaY * 0.001)); }, { passive: false });
  stage.addEventListener("keydown", event => {
    const act = { ArrowLeft: () => turn(-KEY_DEGREES, 0), ArrowRight: () => turn(KEY_DEGREES, 0),
                  ArrowUp: () => turn(0, KEY_DEGREES), ArrowDown: () => turn(0, -KEY_DEGREES),
                  "+": () => zoom(1 / KEY_ZOOM), "=": () => zoom(1 / KEY_ZOOM), "-": () => zoom(KEY_ZOOM) }[event.key];
    if (!act || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    act();
  });
  divider.addEventListener("pointerdown", event => divider.setPointerCapture(event.pointerId));
  divider.addEventListener("pointermove", event => {
    if (divider.hasPointerCapture(event.pointerId)) split(100 * event.clientX / stage.clientWidth);
  });
  divider.addEventListener("keydown", event => {
    const step = event.shiftKey ? 5 * KEY_SHARE : KEY_SHARE;
    const share = { ArrowLeft: scenes.share - step, ArrowDown: scenes.share - step, ArrowRight: scenes.share + step,
                    ArrowUp: scenes.share + step, Home: 0, End: 100 }[event.key];
    if (share === undefined) return;
    event.preventDefault();
    split(share);
  });
  let frame = 0, last = null;
  const spin = now => {
    if (last !== null) turn((now - last) / 1000 * TURN_DEGREES_PER_S, 0);
    last = now;
    frame = requestAnimationFrame(spin);
  };
  turntable.addEventListener("click", () => {
    const on = turntable.getAttribute("aria-pressed") !== "true";
    turntable.setAttribute("aria-pressed", on);
    last = null;
    if (on) frame = requestAnimationFrame(spin);
    else cancelAnimationFrame(frame);
  });
  document.getElementById("reset").addEventListener("click", reset);
  theme.addEventListener("click", () => dress(root.dataset.theme !== "dark"));
  new ResizeObserver(() => {
    for (const pane of scenes.panes) pane.app.resizeCanvas();
    redraw();
  }).observe(stage);
}

function describe({ role, name, bytes, times_less, num_gaussians, degree }) {
  const lines = [`${num_gaussians.toLocaleString("en")} Gaussians, harmonics of degree ${degree}`, name];
  if (times_less !== null) lines.unshift(`${Number(times_less.toPrecision(3))} times less than a plain .ply`);
  const card = element("section", { class: `card ${role}`, "aria-label": role },
    element("h2", {}, role[0].toUpperCase() + role.slice(1)), element("b", {}, size(bytes)),
    ...lines.map(line => element("p", {}, line)));
  document.body.append(card);
  return card;
}

async function measure(card) {
  const line = element("p", { id: "quality" }, "measuring…");
  card.insertBefore(line, card.lastChild);
  try {
    const { psnr, views } = await ask("quality.json");
    line.textContent = `${psnr.toFixed(1)} dB against the original, ${views} views`;
  } catch (error) {
    line.textContent = `not measured: ${error.message}`;
  }
}

async function ask(path) {
  const answer = await fetch(path, { cache: "no-store" });
  if (!answer.ok) throw new Error(`${path}: HTTP ${answer.status}`);
  return answer.json();
}

async function start() {
  const dark = matchMedia("(prefers-color-scheme:dark)");
  dress(dark.matches);
  dark.addEventListener("change", () => dress(dark.matches));
  pc = await import("./playcanvas.mjs");
  const about = await ask("about.json"), [x, y, z] = about.target;
  const cards = about.scenes.map(describe);
  for (const { file } of about.scenes) scenes.panes.push(await Pane.open(file, about.fov));
  scenes.home = { yaw: 0, pitch: about.elevation, distance: about.distance, target: new pc.Vec3(x, -y, -z) };
  reset();
  listen();
  if (cards.length === 2) {
    divider.hidden = false;
    split(50);
  }
  while (!settled()) await new Promise(requestAnimationFrame);
  tell("ready", "");
  if (cards.length === 2) await measure(cards[1]);
}

start().catch(error => tell("failed", `Nothing to see: ${error.message ?? error}`));
