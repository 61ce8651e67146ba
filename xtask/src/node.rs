//! What makes a machine a node: the shim's executables, built here, and the packages of the distribution that its
//! tests need.

use crate::step::{self, Result, Workspace};
use crate::{profiled, tools};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// An executable that runs anywhere, an empty container included.
pub struct Static {
    /// The package that it is built from.
    pub package: &'static str,
    /// The file.
    pub name: &'static str,
}

/// They lie side by side on a node.
pub const SHIM: [Static; 4] = [
    Static { package: "shim", name: "containerd-shim-mailroom-v1" },
    Static { package: "compiler", name: "mailroom-compiler" },
    POD_HOST,
    Static { package: "node", name: "mailroom-node" },
];

/// What the shim puts into pods.
pub const POD_HOST: Static = Static { package: "pod-host", name: "mailroom-host" };

/// What the tests put into images.
const SIDECAR: Static = Static { package: "sidecar", name: "sidecar" };

/// What the host and the shim are measured against.
const NATIVE: Static = Static { package: "native-handler", name: "native-handler" };

/// The package of the shim's tests under a containerd.
const TESTS: &str = "shim-tests";

/// The executable of those tests.
pub const CRI: &str = "cri";

/// How the names of those begin that a real Kubernetes runs; they are not among the others.
pub const KUBERNETES: &str = "kubernetes::";

/// What builds and runs the tests.
pub const TEST: [&str; 8] = ["test", "--release", "--package", "shim", "--package", "node", "--package", TESTS];

/// What a node has of its distribution: the first file is there when the package is.
const PACKAGES: [(&str, &str); 6] = [
    ("bin/containerd", "containerd"),
    ("sbin/runc", "runc"),
    ("bin/crun", "crun"),
    ("lib/cni/bridge", "containernetworking-plugins"),
    ("bin/protoc", "protobuf-compiler"),
    ("sbin/ip", "iproute2"),
];

/// Where that file can be.
const PREFIXES: [&str; 3] = ["/usr", "/usr/local", "/"];

/// Builds the shim's executables into `TARGET/shim`.
pub fn build(workspace: &Workspace) -> Result<()> {
    for executable in &SHIM {
        executable.build(workspace, "shim", Profile::Release)?;
    }
    Ok(())
}

/// Builds the host and the native handler as they are shipped, to be measured, into `TARGET/shipped`.
pub fn build_shipped(workspace: &Workspace, nats_server: &Path) -> Result<()> {
    [POD_HOST, NATIVE].iter().try_for_each(|executable| profiled::build(workspace, nats_server, executable, "shipped"))
}

/// Sees to it that this machine can be a node and build the tests of one.
pub fn ensure_packages() -> Result<()> {
    let is_there = |file: &str| PREFIXES.iter().any(|prefix| Path::new(prefix).join(file).is_file());
    let missing: Vec<_> = PACKAGES.iter().filter(|(file, _)| !is_there(file)).map(|(_, package)| *package).collect();
    if missing.is_empty() {
        return Ok(());
    }
    tools::install(&missing, "by the tests of the shim")
}

/// Builds the shim and runs its unit tests, and the tests of it under a containerd; those named in `filters`, if any.
pub fn test(workspace: &Workspace, nats_server: &Path, filters: &[OsString]) -> Result<()> {
    build(workspace)?;
    build_sidecar(workspace)?;
    let mut test = workspace.cargo(&TEST);
    test.envs(crate::places(workspace)).envs(places(workspace, nats_server));
    crate::filter(&mut test, filters);
    if filters.is_empty() {
        test.arg("--");
    }
    test.args(["--skip", KUBERNETES]);
    step::run("run the tests of the shim", test)
}

/// Builds what the tests put into images.
pub fn build_sidecar(workspace: &Workspace) -> Result<()> {
    SIDECAR.build(workspace, "sidecar", Profile::Release)
}

/// Builds the tests of the shim under a containerd, as [`test()`] does, and says where their executable is.
pub fn build_tests(workspace: &Workspace) -> Result<PathBuf> {
    eprintln!("==> build the tests of the shim");
    let mut build = workspace.cargo(&TEST);
    let artifacts = step::output(build.args(["--no-run", "--message-format=json-render-diagnostics"]))?;
    let mut executables = artifacts.lines().filter(|line| line.contains(&format!(r#""name":"{CRI}""#)));
    let executable = executables.find_map(|line| step::json_string(line, "executable"));
    executable.map(PathBuf::from).ok_or_else(|| format!("cargo built no test called {CRI}"))
}

/// Where the tests of the shim find what [`crate::places`] does not have.
pub fn places(workspace: &Workspace, nats_server: &Path) -> [(&'static str, PathBuf); 3] {
    [
        ("MAILROOM_TEST_NATS_SERVER", nats_server.to_owned()),
        ("MAILROOM_TEST_SHIM", workspace.target.join("shim")),
        ("MAILROOM_TEST_SIDECAR", workspace.target.join("sidecar").join(SIDECAR.name)),
    ]
}

/// Measures the shim under a containerd.
pub fn bench(workspace: &Workspace, nats_server: &Path, rounds: u32) -> Result<()> {
    build(workspace)?;
    build_sidecar(workspace)?;
    NATIVE.build(workspace, "native", Profile::Plain)?;
    let bins = ["build", "--release", "--package", "shim", "--package", TESTS, "--bins"];
    step::run("build the benchmark", workspace.cargo(&bins))?;
    let mut bench = workspace.command(workspace.target.join("release/bench-shim"));
    bench.envs(crate::places(workspace)).envs(places(workspace, nats_server));
    bench.args(["--rounds", &rounds.to_string(), "--json"]).arg(workspace.target.join("bench/shim.json"));
    step::run("measure pods", bench)
}

/// Writes an executable without some of its symbols, as strip(1) says with `what`, to another place.
pub fn strip(workspace: &Workspace, what: &str, from: &Path, to: &Path) -> Result<()> {
    let mut strip = workspace.command("strip");
    strip.arg(what).arg("-o").arg(to).arg(from);
    step::run(&format!("take the debugging information out of {}", from.display()), strip)
}

/// How an executable is built.
#[derive(Clone, Copy)]
pub enum Profile {
    /// As everything is, with the names of its functions.
    Release,
    /// The same without symbols.
    Plain,
    /// Optimized across crates, which takes minutes, and without symbols.
    Optimized,
}

impl Static {
    /// Flags that link everything in. Packed, the relocations of an executable take a tenth of their room.
    pub const FLAGS: [&str; 2] = ["-Ctarget-feature=+crt-static", "-Clink-arg=-Wl,-z,pack-relative-relocs"];

    /// Builds it into `folder` below the target directory. By itself: built together, the packages would share the
    /// features of their dependencies, and the pods' host would have a compiler in it.
    pub fn build(&self, workspace: &Workspace, folder: &str, profile: Profile) -> Result<()> {
        let Self { package, name } = self;
        let (profile, strip_what) = match profile {
            Profile::Release => ("release", "--strip-debug"),
            Profile::Plain => ("release", "--strip-all"),
            Profile::Optimized => ("optimized", "--strip-all"),
        };
        let mut cargo = workspace.cargo(&["rustc", "--profile", profile, "--package", package, "--bin", name, "--"]);
        cargo.args(Self::FLAGS);
        step::run(&format!("build {name}"), cargo)?;
        let folder = workspace.target.join(folder);
        tools::make_folder(&folder)?;
        strip(workspace, strip_what, &workspace.target.join(profile).join(name), &folder.join(name))
    }
}
