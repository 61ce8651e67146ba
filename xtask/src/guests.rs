//! The components: which crates, for which target, with which flags.

use crate::step::{self, Result, Workspace};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A crate that becomes a component.
struct Guest {
    /// What the component is called.
    name: &'static str,
    package: &'static str,
    target: &'static str,
    rustflags: &'static str,
    features: &'static str,
}

const CORE: &str = "wasm32-unknown-unknown";
const WASIP2: &str = "wasm32-wasip2";

/// The largest single gain for a guest that searches text, and all that the ordinary build has of these.
const SIMD: &str = "-C target-feature=+simd128";

/// - SIMD, as above.
/// - The stack lies at the bottom, below the data, so that its overflow traps instead of overwriting them. It is small
///   so that it leaves the initial memory to the heap, and so that its pages stay few.
/// - Where it ends, the data begin. Whoever reads a page of them is given the rest of its 64 KiB too (`fault_around_bytes`
///   of the kernel), and every page that is there costs each later scan of the slot. What a small mail needs of the
///   triage's data, 11 KiB, is their end, see `guest/Cargo.toml`. With a stack of this size it lies behind 192 KiB, where
///   64 KiB begin, and leaves most of its last page to the heap. A test says when that is so no longer: then choose another
///   multiple of 16, with which the data end 12 to 13 KiB behind a multiple of 64. Other guests' data differ.
/// - The initial memory, which [`Guest::cargo`] adds, is the heap: a bump allocator in it never grows the memory, and
///   each growth costs system calls.
const LEAN: &str = "-C target-feature=+simd128 -C link-arg=-zstack-size=93632";

/// Holds the data of the program and any ordinary mail; a larger one grows the memory, slower but right.
const INITIAL_MEMORY_BYTES: u64 = 512 * 1024;

/// The variables that name the models that are put into the triage, see `guest/component/build.rs`.
const MODELS: [&str; 2] = ["MAILROOM_TEAM_MODEL", "MAILROOM_PRIORITY_MODEL"];

/// Memory comes in pages of so many bytes.
const PAGE_BYTES: u64 = 64 * 1024;

/// The two faces of the triage are core modules without WASI, which the host's `compile` command wraps: a plain
/// `wasmtime serve` refuses the `wasi:cli/environment` that the standard library would import. The ordinary triage and
/// the guests for the tests are components as the compiler leaves them, like most people's; the former is there to be measured.
const GUESTS: [Guest; 7] = [
    Guest { name: "triage", package: "triage", target: CORE, rustflags: LEAN, features: "" },
    Guest { name: "triage-memory", package: "triage", target: CORE, rustflags: LEAN, features: "memory" },
    Guest { name: "triage-http", package: "triage-http", target: CORE, rustflags: LEAN, features: "" },
    Guest { name: "triage-ordinary", package: "triage", target: WASIP2, rustflags: SIMD, features: "" },
    Guest { name: "actor", package: "actor", target: WASIP2, rustflags: "", features: "" },
    Guest { name: "caller", package: "actor", target: WASIP2, rustflags: "", features: "http" },
    Guest { name: "keeper", package: "keeper", target: WASIP2, rustflags: "", features: "" },
];

/// Sees to it that the toolchain can compile for both wasm targets.
pub fn ensure_targets(workspace: &Workspace) -> Result<()> {
    let sysroot = step::output(workspace.command("rustc").args(["--print", "sysroot"]))?;
    let libraries = Path::new(sysroot.trim()).join("lib/rustlib");
    let missing: Vec<_> = [WASIP2, CORE].into_iter().filter(|target| !libraries.join(target).is_dir()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let targets = missing.join(" ");
    if !step::succeeds(workspace.command("rustup").arg("--version")) {
        return Err(format!(
            "this Rust toolchain has no standard library for {targets}, and there is no rustup to add it; install rustup"
        ));
    }
    let mut add = workspace.command("rustup");
    add.args(["target", "add"]).args(&missing);
    step::run(&format!("add {targets} to the Rust toolchain"), add)
}

/// What the triage is called with a model that was learned from mails that are made up.
const LEARNED: Guest = Guest { name: "triage-learned", package: "triage", target: CORE, rustflags: LEAN, features: "" };

/// Builds every component into `TARGET/components`.
pub fn build(workspace: &Workspace) -> Result<()> {
    GUESTS.iter().try_for_each(|guest| guest.build(workspace, &models()))
}

/// Builds the triage with this model as the component `triage-learned`.
pub fn build_learned(workspace: &Workspace, model: &Path) -> Result<()> {
    LEARNED.build(workspace, &[(MODELS[0], model.to_owned())])
}

/// The packages that are built for wasm only; one may be in it more than once.
pub fn packages() -> impl Iterator<Item = &'static str> {
    GUESTS.iter().map(|guest| guest.package)
}

/// Lints every guest for the target it is built for.
pub fn lint(workspace: &Workspace) -> Result<()> {
    for guest in &GUESTS {
        let mut clippy = guest.cargo(workspace, "clippy", &models());
        clippy.args(["--", "-D", "warnings"]);
        step::run(&format!("lint the guest {} for {}", guest.name, guest.target), clippy)?;
    }
    Ok(())
}

/// The models that the environment asks for.
fn models() -> Vec<(&'static str, PathBuf)> {
    let model = |variable| Some((variable, PathBuf::from(std::env::var_os(variable).filter(|file| !file.is_empty())?)));
    MODELS.into_iter().filter_map(model).collect()
}

impl Guest {
    fn build(&self, workspace: &Workspace, models: &[(&str, PathBuf)]) -> Result<()> {
        let components = workspace.target.join("components");
        std::fs::create_dir_all(&components).map_err(|err| format!("create {}: {err}", components.display()))?;
        let name = self.name;
        step::run(&format!("build the guest {name} for {}", self.target), self.cargo(workspace, "build", models))?;
        // Cargo writes a library called `a-b` to `a_b.wasm`.
        let module = format!("{}/guest/{}.wasm", self.target, self.package.replace('-', "_"));
        let module = workspace.target.join(module);
        let component = components.join(format!("{name}.wasm"));
        if self.target == CORE {
            let mut compile = workspace.command(workspace.target.join("release/host"));
            compile.arg("compile").arg(&module).arg("--output").arg(&component);
            step::run(&format!("make {name} a component"), compile)?;
        } else {
            std::fs::copy(&module, &component)
                .map_err(|err| format!("copy {} to {}: {err}", module.display(), component.display()))?;
        }
        Ok(())
    }

    fn cargo(&self, workspace: &Workspace, subcommand: &str, models: &[(&str, PathBuf)]) -> Command {
        let mut cargo = workspace.cargo(&[subcommand, "--profile", "guest"]);
        cargo.args(["--package", self.package, "--target", self.target, "--features", self.features]);
        // Flags meant for the native build, a linker or a CPU for instance, would break this one, and they would
        // replace those of the target.
        cargo.env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS");
        let variable = format!("CARGO_TARGET_{}_RUSTFLAGS", self.target.to_uppercase().replace('-', "_"));
        let mut flags = self.rustflags.to_owned();
        if self.target == CORE {
            let models: u64 = models.iter().filter_map(|(_, file)| file.metadata().ok()).map(|file| file.len()).sum();
            let memory = INITIAL_MEMORY_BYTES + models.next_multiple_of(PAGE_BYTES);
            flags += &format!(" -C link-arg=--initial-memory={memory}");
        }
        cargo.env(variable, flags);
        // The compiler runs in another folder.
        cargo.envs(models.iter().filter_map(|(variable, file)| Some((variable, file.canonicalize().ok()?))));
        cargo
    }
}
