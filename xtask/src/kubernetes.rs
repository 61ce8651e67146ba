//! A Kubernetes for the tests: etcd of the distribution, and four programs that are built from Debian's source package,
//! since no registry that everybody reaches has them.
//!
//! They are kept outside of the repository, for all checkouts of this user. A build that was broken off goes on where
//! it was; what is kept is complete.

use crate::step::{self, Result, Workspace};
use crate::{node, tools};
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

/// What is built.
const VERSION: &str = "1.20.2";

/// What Debian 12 calls it.
const SOURCE: &str = "kubernetes-1.20.5+really1.20.2";

/// The control plane but for etcd, and what makes a machine a node.
const PROGRAMS: [&str; 4] = ["kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet"];

/// The compiler and its library; unpacked, not installed.
const GO: [&str; 2] = ["golang-1.19-go", "golang-1.19-src"];
const GOROOT: &str = "usr/lib/go-1.19";

/// A library of Kubernetes as old as itself reads maps in a way that this compiler's are not made for any more: the API
/// server ends at the first object of a kind that is not its own. Debian has a later version of it.
const MENDED: (&str, &str) = ("golang-github-modern-go-reflect2-dev", "github.com/modern-go/reflect2");

/// Programs that the build calls, and their packages.
const TOOLS: [(&str, &str); 4] = [("make", "make"), ("rsync", "rsync"), ("dpkg-source", "dpkg-dev"), ("bash", "bash")];

/// Programs that the tests call.
const TEST_TOOLS: [(&str, &str); 1] = [("openssl", "openssl")];

/// Where the sources of a program of Kubernetes believe that they are.
const PACKAGE: &str = "src/k8s.io/kubernetes";

/// The interfaces to clouds, and to Docker, which a machine of the tests has no use for: nearly half of the code.
const TAGS: &str = "providerless,dockerless";

/// So many packages are compiled between two signs of life.
const PROGRESS: usize = 100;

/// Runs the tests under a real Kubernetes; those named in `filters`, if any.
pub fn test(workspace: &Workspace, nats_server: Option<PathBuf>, filters: &[std::ffi::OsString]) -> Result<()> {
    if !tools::is_root()? {
        return Err("the tests under Kubernetes start containers, which takes root".to_owned());
    }
    node::ensure_packages()?;
    tools::ensure(&TEST_TOOLS, "by the tests under Kubernetes")?;
    let etcd = tools::etcd(workspace)?;
    let kubectl = tools::kubectl(workspace)?;
    let nats_server = tools::nats_server(workspace, nats_server)?;
    let programs = programs()?;
    crate::build(workspace)?;
    node::build(workspace)?;
    node::build_sidecar(workspace)?;
    let mut test = workspace.cargo(&node::TEST);
    test.envs(crate::places(workspace)).envs(node::places(workspace, &nats_server));
    test.env("MAILROOM_TEST_ETCD", etcd).env("MAILROOM_TEST_KUBECTL", kubectl);
    test.env("MAILROOM_TEST_KUBERNETES", programs);
    // One cluster at a time; what it prints are the times that it took.
    test.args(["--test", node::CRI, "--", "--test-threads=1", "--nocapture"]);
    if filters.is_empty() {
        test.arg(node::KUBERNETES);
    }
    test.args(filters.iter().map(|filter| {
        let mut name = std::ffi::OsString::from(node::KUBERNETES);
        name.push(filter);
        name
    }));
    step::run("run the tests under Kubernetes", test)
}

/// The folder with the programs, which are built if need be.
fn programs() -> Result<PathBuf> {
    let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache"));
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|cache| cache.is_absolute()).or_else(home);
    let folder = cache.ok_or("neither XDG_CACHE_HOME nor HOME is set")?.join("mailroom/kubernetes");
    let programs = folder.join(VERSION);
    if programs.is_dir() {
        return Ok(programs);
    }
    eprintln!("Kubernetes {VERSION} is built, once, into {}: minutes, and 4 GB until it is done", programs.display());
    tools::ensure(&TOOLS, "to build Kubernetes")?;
    let build = Build { folder: folder.join(format!("{VERSION}.part")) };
    tools::make_folder(&build.folder)?;
    build.fetch_go()?;
    build.fetch_sources()?;
    build.generate()?;
    build.compile()?;
    rename(&build.programs(), &programs)?;
    tools::remove(&build.folder)?;
    Ok(programs)
}

/// A build that may have been broken off; each step leaves what it does complete or not at all.
struct Build {
    folder: PathBuf,
}

impl Build {
    /// Unpacks the compiler.
    fn fetch_go(&self) -> Result<()> {
        let (go, part) = (self.folder.join("go"), self.folder.join("go.part"));
        if go.is_dir() {
            return Ok(());
        }
        tools::remove(&part)?;
        GO.iter().try_for_each(|package| self.unpack(package, &part))?;
        rename(&part, &go)
    }

    /// Unpacks a package of the distribution into a folder, beside what there is.
    fn unpack(&self, package: &str, folder: &Path) -> Result<()> {
        let by_hand = format!("Debian 12 has it, the others need not; unpack it to {}", folder.display());
        let deb = tools::download(&self.folder, package, package, &by_hand)?;
        let mut unpack = Command::new("dpkg-deb");
        unpack.arg("--extract").arg(&deb).arg(folder);
        step::run(&format!("unpack {package} (it is not installed)"), unpack)?;
        tools::remove(&self.folder.join(format!("{package}.part")))
    }

    /// Unpacks Debian's source package.
    fn fetch_sources(&self) -> Result<()> {
        let (sources, part) = (self.sources(), self.folder.join("source.part"));
        if sources.is_dir() {
            return Ok(());
        }
        tools::remove(&part)?;
        tools::make_folder(&part)?;
        tools::download_source(&part, "kubernetes")?;
        let found = part.join(SOURCE);
        if !found.is_dir() {
            return Err(format!(
                "the distribution has another kubernetes than {SOURCE}, which the tests are for: Debian 12 has it; \
                 or put the programs {} of version {VERSION} into the folder named above",
                PROGRAMS.join(", ")
            ));
        }
        let (package, library) = MENDED;
        self.unpack(package, &part)?;
        let vendored = found.join("vendor").join(library);
        tools::remove(&vendored)?;
        rename(&part.join("usr/share/gocode/src").join(library), &vendored)?;
        tools::make_folder(sources.parent().ok_or("a folder without a parent")?)?;
        rename(&found, &sources)?;
        tools::remove(&part)
    }

    /// Generates those sources that are not in the package, the interface of the API server for one.
    fn generate(&self) -> Result<()> {
        let generated = self.folder.join("generated");
        if generated.is_file() {
            return Ok(());
        }
        let version = self.folder.join("version");
        let (major, minor) = major_and_minor();
        let text = format!(
            "KUBE_GIT_COMMIT=mailroom\nKUBE_GIT_TREE_STATE=clean\nKUBE_GIT_VERSION=v{VERSION}\n\
             KUBE_GIT_MAJOR={major}\nKUBE_GIT_MINOR={minor}\n"
        );
        fs::write(&version, text).map_err(|err| format!("write {}: {err}", version.display()))?;
        let mut make = self.command("make");
        make.arg("generated_files").env("KUBE_GIT_VERSION_FILE", version);
        step::run("generate sources of Kubernetes, some 2 minutes", make)?;
        fs::write(&generated, "").map_err(|err| format!("write {}: {err}", generated.display()))
    }

    /// Compiles the programs, all in one go: they share most of their packages.
    fn compile(&self) -> Result<()> {
        eprintln!("==> compile {}, some 1,900 packages, 3 to 6 minutes", PROGRAMS.join(", "));
        let start = Instant::now();
        tools::make_folder(&self.programs())?;
        let (major, minor) = major_and_minor();
        let package = "k8s.io/kubernetes/vendor/k8s.io/component-base/version";
        let flags = format!(
            "-s -w -X {package}.gitVersion=v{VERSION} -X {package}.gitMajor={major} -X {package}.gitMinor={minor}"
        );
        let mut go = self.command("go");
        go.args(["build", "-v", "-trimpath", "-tags", TAGS, "-ldflags", &flags, "-o"]).arg(self.programs());
        go.args(PROGRAMS.map(|program| format!("./cmd/{program}"))).stderr(Stdio::piped());
        let mut child = go.spawn().map_err(|err| format!("start go: {err}"))?;
        let (mut packages, mut said) = (0, Vec::new());
        for line in
            child.stderr.take().into_iter().flat_map(|pipe| BufReader::new(pipe).lines()).map_while(|line| line.ok())
        {
            packages += 1;
            if packages % PROGRESS == 0 {
                eprintln!("    {packages} packages, {:.0} s", start.elapsed().as_secs_f32());
            }
            said.push(line);
        }
        let status = child.wait().map_err(|err| format!("wait for go: {err}"))?;
        if !status.success() {
            let last = &said[said.len().saturating_sub(20)..];
            return Err(format!("could not compile Kubernetes: go ended with {status}\n{}", last.join("\n")));
        }
        eprintln!("    took {:.1} s", start.elapsed().as_secs_f32());
        Ok(())
    }

    /// A command that works on the sources, with the compiler unpacked here and nothing of the user's settings for it.
    fn command(&self, program: &str) -> Command {
        let goroot = self.folder.join("go").join(GOROOT);
        let mut command = Command::new(program);
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"GO")) {
            command.env_remove(name);
        }
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path = std::env::join_paths([goroot.join("bin")].into_iter().chain(std::env::split_paths(&path)));
        command.current_dir(self.sources()).env("PATH", path.unwrap_or_default());
        command
            .env("GOROOT", goroot)
            .env("GOPATH", self.folder.join("gopath"))
            .env("GOCACHE", self.folder.join("cache"));
        // Modules are of a later time than this way of building. The compiler collects less of its garbage, which is
        // faster.
        command.env("GO111MODULE", "off").env("CGO_ENABLED", "0").env("GOFLAGS", "").env("GOGC", "400");
        command
    }

    fn sources(&self) -> PathBuf {
        self.folder.join("gopath").join(PACKAGE)
    }

    fn programs(&self) -> PathBuf {
        self.folder.join("bin")
    }
}

fn major_and_minor() -> (&'static str, &'static str) {
    let mut parts = VERSION.split('.');
    (parts.next().unwrap_or_default(), parts.next().unwrap_or_default())
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).map_err(|err| format!("rename {} to {}: {err}", from.display(), to.display()))
}
