//! What is shipped: executables that run on any Linux of this processor, packed for those who run a host and for the
//! nodes of a Kubernetes cluster.

use crate::node::{POD_HOST, Profile, SHIM, Static};
use crate::step::{self, Result, Workspace};
use crate::{profiled, tools};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const HOST: Static = Static { package: "host-main", name: "host" };

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The shells that `host completions` knows and distributions have a folder for, with the names that files have there.
const COMPLETIONS: [(&str, &str); 3] = [("bash", "host.bash"), ("zsh", "_host"), ("fish", "host.fish")];

/// What is told to whoever unpacks an archive.
const PAGES: [&str; 4] = ["LICENSE", "README.md", "CHANGELOG.md", "docs"];

/// Programs that a release is made with, and their packages.
const TOOLS: [(&str, &str); 5] =
    [("strip", "binutils"), ("readelf", "binutils"), ("tar", "tar"), ("gzip", "gzip"), ("sha256sum", "coreutils")];

/// Builds the executables without their symbols, tries them, and packs them into `TARGET/dist`.
///
/// Of the same executables the archives are the same, byte by byte: what is in them is sorted, belongs to root and is
/// as old as the commit, or as `SOURCE_DATE_EPOCH` says.
pub fn dist(workspace: &Workspace, nats_server: Option<PathBuf>) -> Result<()> {
    tools::ensure(&TOOLS, "to pack a release")?;
    profiled::ensure_tools(workspace)?;
    let nats_server = tools::nats_server(workspace, nats_server)?;
    crate::build(workspace)?;
    let folder = workspace.target.join("dist");
    tools::remove(&folder)?;
    let host = Archive::new(&folder, "mailroom")?;
    let shim = Archive::new(&folder, "mailroom-shim")?;
    let executables: Vec<_> = SHIM.iter().map(|executable| (executable, &shim)).chain([(&HOST, &host)]).collect();
    for (executable, archive) in &executables {
        let folder = format!("dist/{}", archive.name);
        // Those that run messages are worth the time that it takes to optimize them; the one with a compiler in it not
        // twice as much, for its profile.
        match executable.name {
            name if name == POD_HOST.name => profiled::build(workspace, &nats_server, executable, &folder)?,
            name if name == HOST.name => executable.build(workspace, &folder, Profile::Optimized)?,
            _ => executable.build(workspace, &folder, Profile::Plain)?,
        }
    }
    copy(workspace, &workspace.target.join("components/triage.wasm"), &host.contents)?;
    let completions = host.contents.join("completions");
    tools::make_folder(&completions)?;
    for (shell, file) in COMPLETIONS {
        let script = step::output(Command::new(host.contents.join(HOST.name)).args(["completions", shell]))?;
        fs::write(completions.join(file), script).map_err(|err| format!("write {file}: {err}"))?;
    }

    eprintln!("==> try the executables in an empty environment");
    let mut version = String::new();
    for (executable, archive) in &executables {
        version = check(&archive.contents.join(executable.name), version)?;
    }
    check_commit(workspace, &version)?;
    triage(workspace, &host.contents)?;

    let time = time(workspace)?;
    let mut table = format!("{version}\n");
    for archive in [&host, &shim] {
        for page in PAGES {
            copy(workspace, &workspace.root.join(page), &archive.contents)?;
        }
        table += &size(&archive.pack(workspace, &time)?, "")?;
        for (executable, _) in executables.iter().filter(|(_, of)| std::ptr::eq(*of, archive)) {
            table += &size(&archive.contents.join(executable.name), "  ")?;
        }
    }
    let mut sums = workspace.command("sha256sum");
    sums.current_dir(&folder).args([&host, &shim].map(Archive::file));
    let sums = step::output(&mut sums)?;
    fs::write(folder.join("SHA256SUMS"), &sums).map_err(|err| format!("write SHA256SUMS: {err}"))?;
    println!("{table}\nin {}, with SHA256SUMS", folder.display());
    Ok(())
}

/// One file to download; it unpacks to a folder of its name.
struct Archive {
    name: String,
    contents: PathBuf,
}

impl Archive {
    fn new(folder: &Path, what: &str) -> Result<Self> {
        let name = format!("{what}-{VERSION}-{}-{}", std::env::consts::ARCH, std::env::consts::OS);
        let contents = folder.join(&name);
        tools::make_folder(&contents)?;
        Ok(Self { name, contents })
    }

    fn file(&self) -> String {
        format!("{}.tar.gz", self.name)
    }

    /// Writes the archive beside the folder, all of it as of `time`, in seconds since 1970.
    fn pack(&self, workspace: &Workspace, time: &str) -> Result<PathBuf> {
        let folder = self.contents.parent().ok_or("an archive without a folder")?;
        let mut tar = workspace.command("tar");
        tar.arg("--directory").arg(folder).args(["--create", "--file"]).arg(folder.join(self.file()));
        tar.args(["--format=gnu", "--sort=name", "--owner=root:0", "--group=root:0", "--mode=u=rwX,go=rX"]);
        // Without a name and a time of gzip's own.
        tar.arg(format!("--mtime=@{time}")).args(["--use-compress-program", "gzip -n9"]).arg(&self.name);
        step::run(&format!("pack {}", self.file()), tar)?;
        Ok(folder.join(self.file()))
    }
}

/// What `executable` says to `--version`, but for its name: the same as `before`, if that is not empty. It must need
/// no other file to run.
fn check(executable: &Path, before: String) -> Result<String> {
    let shown = executable.display();
    let headers = step::output(Command::new("readelf").args(["--wide", "--segments", "--dynamic"]).arg(executable))?;
    if let Some(line) = headers.lines().find(|line| line.contains("INTERP") || line.contains("(NEEDED)")) {
        return Err(format!("{shown} is not static: {}", line.trim()));
    }
    let output = step::output(nowhere(executable).arg("--version"))?;
    let (_, version) = output.trim().split_once(' ').ok_or_else(|| format!("{shown} names no version: {output}"))?;
    if before.is_empty() || before == version {
        return Ok(version.to_owned());
    }
    Err(format!("{shown} is {version}, others are {before}"))
}

/// `version` has to name the commit that is checked out, if git knows one.
fn check_commit(workspace: &Workspace, version: &str) -> Result<()> {
    match git(workspace, &["rev-parse", "--short=12", "HEAD"]) {
        Some(commit) if !version.contains(&commit) => Err(format!("built from {version}, but HEAD is {commit}")),
        _ if version.contains("-dirty") => {
            eprintln!("    the sources are not as they are at the commit: {version}");
            Ok(())
        }
        _ => Ok(()),
    }
}

/// The host in the folder `contents` gives a verdict on a sample mail.
fn triage(workspace: &Workspace, contents: &Path) -> Result<()> {
    let mut triage = nowhere(&contents.join(HOST.name));
    triage.arg("triage").arg(contents.join("triage.wasm")).arg(workspace.root.join("tests/mails/01-outage.eml"));
    let verdict = step::output(&mut triage)?;
    if verdict.contains(r#""priority":"urgent""#) {
        Ok(())
    } else {
        Err(format!("the verdict on an outage: {verdict}"))
    }
}

/// `executable` without any environment.
fn nowhere(executable: &Path) -> Command {
    let mut command = Command::new(executable);
    command.env_clear().current_dir("/");
    command
}

/// The time that files in archives get, in seconds since 1970.
fn time(workspace: &Workspace) -> Result<String> {
    let given = std::env::var("SOURCE_DATE_EPOCH").ok().or_else(|| git(workspace, &["log", "-1", "--format=%ct"]));
    let time = given.unwrap_or_else(|| "0".to_owned());
    if time.parse::<u64>().is_err() {
        return Err(format!("SOURCE_DATE_EPOCH={time}: a number of seconds since 1970"));
    }
    Ok(time)
}

/// What git says of the repository. Nothing without one.
fn git(workspace: &Workspace, args: &[&str]) -> Option<String> {
    let output = workspace.command("git").args(args).output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn copy(workspace: &Workspace, from: &Path, to: &Path) -> Result<()> {
    step::output(workspace.command("cp").arg("--recursive").arg(from).arg(to)).map(drop)
}

/// A line of the table.
fn size(file: &Path, indent: &str) -> Result<String> {
    let metadata = file.metadata().map_err(|err| format!("look at {}: {err}", file.display()))?;
    let name = file.file_name().unwrap_or_default().display();
    Ok(format!("{:<44} {:>6.1} MB\n", format!("{indent}{name}"), metadata.len() as f64 / 1e6))
}
