//! What a guest may reach: which imports are linked, which need a grant, which are refused.
//!
//! A guest has no file, socket, environment variable or argument. The WASI base is linked because every ordinary
//! toolchain imports it; behind it are an empty file system, clocks, random numbers and two bounded output streams.
//! `wasi:config` holds what the operator passed with `--config` and is empty otherwise. All else is there if the operator
//! grants it.

mod config;
mod http;
mod keyvalue;
mod output;
mod usage;

pub use config::Configuration;
pub use http::{Http, HttpArgs};
pub(crate) use keyvalue::NatsBucket;
pub use keyvalue::{Bucket, KeyValue};
pub(crate) use output::Output;
pub use usage::Usage;

use crate::interface::{claims, wasi};
use anyhow::{Context, Result, bail};
use prometheus::core::Collector;
use std::sync::Arc;
use wasmtime::component::{Component, HasSelf, Linker, ResourceTable};
use wasmtime::{Engine, ResourceLimiter};
use wasmtime_wasi::{WasiCtx, WasiCtxView, WasiView};
use wasmtime_wasi_http::{WasiHttpCtxView, WasiHttpView};

/// What the operator lets guests have. Clones share what guests share.
#[derive(Debug, Clone, Default)]
pub struct Grants {
    /// What they read through `wasi:config`, or are told.
    pub configuration: Configuration,
    /// What they share through `wasi:keyvalue`.
    pub keyvalue: KeyValue,
    /// Whom they may ask through `wasi:http`.
    pub http: Http,
    /// What they did with it.
    pub usage: Usage,
}

impl Grants {
    /// The metrics of what is granted.
    pub fn metrics(&self) -> impl Iterator<Item = Box<dyn Collector>> {
        let keyvalue = Flag::KeyValue.is_given(self).then(|| self.usage.of_keyvalue());
        let http = Flag::Http.is_given(self).then(|| self.usage.of_http());
        keyvalue.into_iter().chain(http).flatten()
    }

    /// All that can be granted.
    #[cfg(feature = "compile")]
    pub fn all() -> Self {
        Self { keyvalue: KeyValue::Memory(Arc::default()), http: Http::for_trial(), ..Self::default() }
    }
}

/// The state behind one instance: it lives and dies with one message.
pub(crate) struct State {
    grants: Arc<Grants>,
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
    /// Made when the guest first calls into `wasi:http`.
    http: Option<Box<http::Session>>,
}

impl State {
    pub fn new(grants: Arc<Grants>, memory_max_bytes: usize) -> Self {
        Self { grants, wasi: None, limiter: Limiter { memory_max_bytes, memory_refused: false }, host_calls: 0 }
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

impl Wasi {
    fn new() -> Box<Self> {
        let output = Output::default();
        let ctx =
            WasiCtx::builder().stdout(output.clone()).stderr(output.clone()).max_random_size(RANDOM_MAX_BYTES).build();
        Box::new(Self { ctx, table: ResourceTable::new(), output, http: None })
    }
}

impl WasiView for State {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        let wasi = self.called().wasi.get_or_insert_with(Wasi::new);
        WasiCtxView { ctx: &mut wasi.ctx, table: &mut wasi.table }
    }
}

impl WasiHttpView for State {
    fn http(&mut self) -> WasiHttpCtxView<'_> {
        let Self { wasi, grants, .. } = self.called();
        let Wasi { http, table, .. } = &mut **wasi.get_or_insert_with(Wasi::new);
        http.get_or_insert_with(|| Box::new(http::Session::new(grants.clone(), table))).view(table)
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
/// An import that nothing provides, or that is not granted, by name, with what would.
pub(crate) fn link(engine: &Engine, component: &Component, grants: &Grants) -> Result<Linker<State>> {
    let mut linker = Linker::new(engine);
    let mut asks = false;
    for (import, _) in component.component_type().imports(engine) {
        match need(import) {
            Need::Nothing => {}
            Need::Grant(flag) if flag.is_given(grants) => asks |= flag == Flag::Http,
            Need::Grant(flag) => bail!("imports {import}, which {} grants", flag.usage()),
            Need::Other(remedy) => bail!("imports {import}, {remedy}"),
        }
    }
    if component.component_type().imports(engine).next().is_none() {
        return Ok(linker);
    }
    let mut added = add(&mut linker);
    if asks {
        added = added.and_then(|()| http::link(&mut linker));
    }
    added.map_err(anyhow::Error::from).context("link the WASI interfaces")?;
    Ok(linker)
}

fn add(linker: &mut Linker<State>) -> wasmtime::Result<()> {
    use wasi::keyvalue::{atomics, batch, store};
    wasmtime_wasi::p2::add_to_linker_async(linker)?;
    wasi::config::store::add_to_linker::<State, HasSelf<State>>(linker, State::called)?;
    store::add_to_linker::<State, HasSelf<State>>(linker, State::called)?;
    batch::add_to_linker::<State, HasSelf<State>>(linker, State::called)?;
    atomics::add_to_linker::<State, HasSelf<State>>(linker, State::called)?;
    claims::add_to_linker::<State, HasSelf<State>>(linker, State::called)
}

/// What a component would need, for `host inspect`: one line per import.
#[cfg(feature = "compile")]
pub(crate) fn provided(import: &str) -> String {
    match need(import) {
        Need::Nothing => "provided".to_string(),
        Need::Grant(flag) => format!("granted by {}", flag.usage()),
        Need::Other(remedy) => format!("refused, {}", remedy.trim_start_matches("which ")),
    }
}

/// What it takes for an import to be linked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Need {
    Nothing,
    /// The operator's word.
    Grant(Flag),
    /// Something else than this host.
    Other(&'static str),
}

/// A flag with which the operator grants something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flag {
    KeyValue,
    Http,
}

impl Flag {
    fn usage(self) -> &'static str {
        match self {
            Self::KeyValue => "--keyvalue nats:BUCKET (or --keyvalue memory)",
            Self::Http => "--allow-http https://HOST[:PORT]",
        }
    }

    fn is_given(self, grants: &Grants) -> bool {
        match self {
            Self::KeyValue => !matches!(grants.keyvalue, KeyValue::None),
            Self::Http => grants.http.is_granted(),
        }
    }
}

const PREVIEW_2: &str = "and this host provides version 0.2 of it; build the guest for wasm32-wasip2";

fn is_preview_2(import: &str) -> bool {
    import.split_once('@').is_some_and(|(_, version)| version.starts_with("0.2."))
}

fn need(import: &str) -> Need {
    let interface = import.split('@').next().unwrap_or(import);
    let (package, _) = interface.split_once('/').unwrap_or((interface, ""));
    match package {
        "wasi:cli" | "wasi:clocks" | "wasi:filesystem" | "wasi:io" | "wasi:random" => match is_preview_2(import) {
            true => Need::Nothing,
            false => Need::Other(PREVIEW_2),
        },
        "wasi:keyvalue" => Need::Grant(Flag::KeyValue),
        "mailroom:triage" if interface == "mailroom:triage/claims" => Need::Grant(Flag::KeyValue),
        "wasi:config" | "mailroom:triage" => Need::Nothing,
        "wasi:http" if ["wasi:http/outgoing-handler", "wasi:http/types"].contains(&interface) => {
            match is_preview_2(import) {
                true => Need::Grant(Flag::Http),
                false => Need::Other(PREVIEW_2),
            }
        }
        "wasi:sockets" => Need::Other("and a guest gets no network; build it without (componentize-py: --stub-wasi)"),
        _ => Need::Other("which nothing provides; build the guest without it"),
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
    fn imports_are_provided_granted_or_refused_by_name() {
        let provided = ["wasi:cli/stdout@0.2.6", "wasi:io/poll@0.2.0", "wasi:config/store@0.2.0-rc.1", HANDLER];
        let remembering =
            ["wasi:keyvalue/store@0.2.0-draft", "wasi:keyvalue/batch@0.2.0-draft", "mailroom:triage/claims@0.1.0"];
        let asking = ["wasi:http/outgoing-handler@0.2.6", "wasi:http/types@0.2.0"];
        let refused = [
            "wasi:cli/stdout@0.3.0",
            "wasi:sockets/tcp@0.2.6",
            "wasi:http/incoming-handler@0.2.6",
            "wasi:http/types@0.3.0",
            "acme:cloud/all",
            "env",
        ];
        assert!(provided.iter().all(|import| need(import) == Need::Nothing));
        assert!(remembering.iter().all(|import| need(import) == Need::Grant(Flag::KeyValue)));
        assert!(asking.iter().all(|import| need(import) == Need::Grant(Flag::Http)));
        assert!(refused.iter().all(|import| matches!(need(import), Need::Other(_))));
    }
}
