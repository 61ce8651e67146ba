//! What a guest may reach: which imports are linked, which need a grant, which are refused.
//!
//! A guest has no file, socket, environment variable or argument. The WASI base is linked because every ordinary
//! toolchain imports it; behind it are an empty file system, clocks, random numbers and two bounded output streams.
//! `wasi:config` holds what the operator passed with `--config` and is empty otherwise.

mod config;
mod output;

pub use config::Configuration;
pub(crate) use output::Output;

use crate::interface::wasi;
use anyhow::{Context, Result, bail};
use wasmtime::component::{Component, HasSelf, Linker, ResourceTable};
use wasmtime::{Engine, ResourceLimiter};
use wasmtime_wasi::{WasiCtx, WasiCtxView, WasiView};

/// The state behind one instance: it lives and dies with one message.
pub(crate) struct State {
    configuration: Configuration,
    /// Made when the guest first calls into WASI, which a lean guest never does.
    wasi: Option<Box<Wasi>>,
    /// The bounds on memory and tables, and whether the guest ran into them.
    pub limiter: Limiter,
    /// How often the guest called the host. Every import that is linked gets at the state through
    /// `called`, the destructors of resources too.
    pub host_calls: u64,
}

struct Wasi {
    ctx: WasiCtx,
    table: ResourceTable,
    output: Output,
}

impl State {
    pub fn new(configuration: Configuration, memory_max_bytes: usize) -> Self {
        Self { configuration, wasi: None, limiter: Limiter { memory_max_bytes, memory_refused: false }, host_calls: 0 }
    }

    /// The state for one call from the guest.
    fn called(&mut self) -> &mut Self {
        self.host_calls += 1;
        self
    }

    /// What the guest wrote to standard output and standard error.
    pub fn take_output(&mut self) -> Option<Output> {
        self.wasi.take().map(|wasi| wasi.output).filter(|output| !output.is_empty())
    }
}

impl WasiView for State {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        let wasi = self.called().wasi.get_or_insert_with(|| {
            let output = Output::default();
            let ctx = WasiCtx::builder()
                .stdout(output.clone())
                .stderr(output.clone())
                .max_random_size(RANDOM_MAX_BYTES)
                .build();
            Box::new(Wasi { ctx, table: ResourceTable::new(), output })
        });
        WasiCtxView { ctx: &mut wasi.ctx, table: &mut wasi.table }
    }
}

/// Refuses growth beyond the bounds and remembers that it did: a guest that cannot grow its memory mostly traps
/// next, and the trap alone would not say why.
pub(crate) struct Limiter {
    memory_max_bytes: usize,
    pub memory_refused: bool,
}

/// Random bytes that a guest gets with one call. They are made before anything can interrupt it, in some 5 ns each.
const RANDOM_MAX_BYTES: u64 = 64 << 10;

/// The largest table of an instance, in elements.
pub(crate) const TABLE_MAX_ELEMENTS: usize = 20_000;

impl ResourceLimiter for Limiter {
    fn memory_growing(&mut self, _current: usize, desired: usize, _maximum: Option<usize>) -> wasmtime::Result<bool> {
        let granted = desired <= self.memory_max_bytes;
        self.memory_refused |= !granted;
        Ok(granted)
    }

    fn table_growing(&mut self, _current: usize, desired: usize, _maximum: Option<usize>) -> wasmtime::Result<bool> {
        Ok(desired <= TABLE_MAX_ELEMENTS)
    }
}

/// Links what `component` imports.
///
/// # Errors
/// An import that nothing provides, by name, with what would.
pub(crate) fn link(engine: &Engine, component: &Component) -> Result<Linker<State>> {
    for (import, _) in component.component_type().imports(engine) {
        if let Some(refusal) = refusal(import) {
            bail!("imports {import}, {refusal}");
        }
    }
    let mut linker = Linker::new(engine);
    wasmtime_wasi::p2::add_to_linker_async(&mut linker)
        .and_then(|()| wasi::config::store::add_to_linker::<State, HasSelf<State>>(&mut linker, State::called))
        .map_err(anyhow::Error::from)
        .context("link the WASI interfaces")?;
    Ok(linker)
}

/// What a component would need, for `host inspect`: one line per import.
#[cfg(feature = "compile")]
pub(crate) fn provided(import: &str) -> String {
    refusal(import)
        .map_or_else(|| "provided".to_string(), |refusal| format!("refused, {}", refusal.trim_start_matches("which ")))
}

/// Why `import` is not linked, or nothing where it is.
fn refusal(import: &str) -> Option<&'static str> {
    let interface = import.split('@').next().unwrap_or(import);
    let (package, _) = interface.split_once('/').unwrap_or((interface, ""));
    match package {
        "wasi:cli" | "wasi:clocks" | "wasi:filesystem" | "wasi:io" | "wasi:random" => import
            .split_once('@')
            .is_none_or(|(_, version)| !version.starts_with("0.2."))
            .then_some("and this host provides version 0.2 of it; build the guest for wasm32-wasip2"),
        "wasi:config" => None,
        "mailroom:triage" if interface != "mailroom:triage/claims" => None,
        "wasi:keyvalue" | "mailroom:triage" => {
            Some("which this version of the host cannot grant yet; build the guest without it")
        }
        "wasi:http" => Some(
            "which this version of the host cannot grant yet; if this is the face for `wasmtime serve`, run the lean \
             component instead",
        ),
        "wasi:sockets" => Some("and a guest gets no network; build it without (componentize-py: --stub-wasi)"),
        _ => Some("which nothing provides; build the guest without it"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interface::HANDLER;
    use wit_component::{ComponentEncoder, StringEncoding, dummy_module, embed_component_metadata};
    use wit_parser::{ManglingAndAbi, Resolve};

    /// The vendored declarations are the interfaces that wasmtime's own crates implement: a component that imports
    /// all of them, made from the vendored files, links against those crates.
    #[test]
    fn vendored_wasi_declarations_match_wasmtime() -> Result<()> {
        let mut resolve = Resolve::default();
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../wit");
        resolve.push_path(root)?;
        let package = resolve.push_str(
            "probe.wit",
            "package mailroom:probe;
             world everything {
                 import wasi:config/store@0.2.0-rc.1;
                 import wasi:keyvalue/store@0.2.0-draft;
                 import wasi:keyvalue/atomics@0.2.0-draft;
                 import wasi:keyvalue/batch@0.2.0-draft;
             }",
        )?;
        let world = resolve.select_world(&[package], Some("everything"))?;
        let mut module = dummy_module(&resolve, world, ManglingAndAbi::Standard32);
        embed_component_metadata(&mut module, &resolve, world, StringEncoding::UTF8)?;
        let bytes = ComponentEncoder::default().validate(true).module(&module)?.encode()?;

        struct Theirs(ResourceTable);
        let engine = Engine::default();
        let component = Component::new(&engine, &bytes)?;
        let imports: Vec<String> =
            component.component_type().imports(&engine).map(|(name, _)| name.to_string()).collect();
        assert_eq!(imports.len(), 4, "{imports:?}");
        let mut linker: Linker<Theirs> = Linker::new(&engine);
        wasmtime_wasi_config::add_to_linker(&mut linker, |_| unreachable!("never instantiated"))?;
        wasmtime_wasi_keyvalue::add_to_linker(&mut linker, |theirs: &mut Theirs| {
            let _ = &theirs.0;
            unreachable!("never instantiated")
        })?;
        linker.instantiate_pre(&component)?;
        Ok(())
    }

    #[test]
    fn imports_are_provided_or_refused_by_name() {
        for import in ["wasi:cli/stdout@0.2.6", "wasi:io/poll@0.2.0", "wasi:config/store@0.2.0-rc.1"] {
            assert_eq!(refusal(import), None, "{import}");
        }
        for import in [
            "wasi:cli/stdout@0.3.0",
            "wasi:sockets/tcp@0.2.6",
            "wasi:http/outgoing-handler@0.2.6",
            "wasi:keyvalue/store@0.2.0-draft",
            "mailroom:triage/claims@0.1.0",
            "acme:cloud/everything",
            "env",
        ] {
            assert!(refusal(import).is_some(), "{import}");
        }
        assert_eq!(refusal(HANDLER), None);
    }
}
