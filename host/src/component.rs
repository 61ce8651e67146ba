//! Components on disk: telling them apart, loading, compiling, keeping what was compiled, making one of a core module,
//! inspecting.

use crate::scheduling::let_others_go_first;
use anyhow::{Context, Result, bail};
use rustix::fs::{MemfdFlags, SealFlags, StatVfsMountFlags, fcntl_add_seals, memfd_create};
use std::fmt;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use wasmtime::Engine;
use wasmtime::component::Component;

/// Stands at the end of a `.cwasm`, behind what wasmtime wrote and before two digests: the BLAKE3 of that together with
/// the second, which takes less of every start than a SHA-256, and the SHA-256 of the component.
const TRAILER_MAGIC: &[u8; 16] = b"mailroom-cwasm-5";
const HASH_BYTES: usize = 32;
const TRAILER_BYTES: usize = TRAILER_MAGIC.len() + 2 * HASH_BYTES;

/// A component ready to be linked.
pub struct Loaded {
    /// The component in the engine it was loaded into.
    pub component: Component,
    /// SHA-256 of the `.wasm`, as `sha256:…`, also when loaded from a `.cwasm`.
    pub digest: String,
    /// Where it came from.
    pub path: PathBuf,
    /// The `.cwasm` that is mapped.
    code: File,
}

impl Loaded {
    /// The component in an engine of the same settings as the one it was loaded into. All share the pages of its code.
    ///
    /// # Errors
    /// The engine has no room for an instance of it.
    pub fn in_engine(&self, engine: &Engine) -> Result<Component> {
        if Engine::same(engine, self.component.engine()) {
            return Ok(self.component.clone());
        }
        mapped(engine, &self.code).map_err(|err| not_loaded(&self.path, err))
    }
}

/// The digest of the only component that may run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pin(String);

impl FromStr for Pin {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.strip_prefix(DIGEST_PREFIX).filter(|digits| digits.len() == 2 * HASH_BYTES);
        match digits {
            Some(digits) if digits.bytes().all(|byte| byte.is_ascii_hexdigit()) => {
                Ok(Self(format!("{DIGEST_PREFIX}{}", digits.to_ascii_lowercase())))
            }
            _ => Err("sha256: and 64 hexadecimal digits, as `host inspect` prints them".into()),
        }
    }
}

impl Pin {
    /// Refuses the component in the file at `path` if its digest is another.
    fn check(pin: Option<&Self>, path: &Path, digest: &str) -> Result<()> {
        match pin {
            Some(Self(pinned)) if pinned != digest => bail!(
                "{0}: is {digest}, and --component-digest lets only {pinned} run; `host inspect` says which digest a \
                 component has",
                path.display()
            ),
            _ => Ok(()),
        }
    }
}

/// What a file's first bytes say it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Component,
    CoreModule,
    Compiled,
    Unknown,
}

impl Kind {
    fn of(bytes: &[u8]) -> Self {
        match bytes {
            [0, b'a', b's', b'm', _, 0, 1, 0, ..] => Self::Component,
            [0, b'a', b's', b'm', ..] => Self::CoreModule,
            [0x7f, b'E', b'L', b'F', ..] => Self::Compiled,
            _ => Self::Unknown,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Component => "component",
            Self::CoreModule => "core module",
            Self::Compiled => "compiled component",
            Self::Unknown => "no WebAssembly",
        })
    }
}

/// Arguments that say what becomes of the machine code of a `.wasm`.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Compiled code")]
pub struct CacheArgs {
    /// Where to keep the machine code of a .wasm for the next start [default: mailroom in $XDG_CACHE_HOME or ~/.cache]
    #[cfg(feature = "compile")]
    #[arg(long, value_name = "FOLDER", env = "MAILROOM_CACHE")]
    cache: Option<PathBuf>,

    /// Most bytes to keep there; what was not used for longest goes first
    #[cfg(feature = "compile")]
    #[arg(long, value_name = "SIZE", env = "MAILROOM_CACHE_MAX", default_value = "512MiB")]
    cache_max: bytesize::ByteSize,

    /// Keep nothing: compile a .wasm at every start
    #[cfg(feature = "compile")]
    #[arg(long, env = "MAILROOM_NO_CACHE", value_parser = clap::builder::BoolishValueParser::new())]
    no_cache: bool,
}

impl CacheArgs {
    /// Loads the component at `path` into `engine`: a `.cwasm` is mapped as it is, a `.wasm` is compiled, unless it
    /// was before. It is looked at no further than to its digest if that is not the one of `pin`.
    ///
    /// # Errors
    /// An unreadable file, one that is no component, one that does not validate, a `.cwasm` made by another version or
    /// configuration, another digest than the one of `pin`; each named, with the remedy.
    pub fn load(&self, engine: &Engine, path: &Path, pin: Option<&Pin>) -> Result<Loaded> {
        let mut file = File::open(path).with_context(|| format!("open component {}", path.display()))?;
        let mut head = [0; 8];
        let length = read_up_to(&mut file, &mut head).with_context(|| format!("read component {}", path.display()))?;
        let name = path.display();
        match Kind::of(&head[..length]) {
            Kind::Component => self.load_wasm(engine, path, pin),
            Kind::Compiled => load_compiled(engine, path, pin, Code::of_operator(&file)),
            Kind::CoreModule => bail!(
                "{name}: is a core module, not a component; make one of it with `host compile {name} --output \
                 COMPONENT.wasm`"
            ),
            Kind::Unknown => bail!("{name}: is no WebAssembly component; it takes a .wasm component or a .cwasm"),
        }
    }

    #[cfg(feature = "compile")]
    fn load_wasm(&self, engine: &Engine, path: &Path, pin: Option<&Pin>) -> Result<Loaded> {
        let bytes = std::fs::read(path).with_context(|| format!("read component {}", path.display()))?;
        let digest = digest(&bytes);
        Pin::check(pin, path, &digest)?;
        let Some(cache) = self.cache(engine) else { return from_bytes(engine, path, &bytes) };
        let key = digest.trim_start_matches(DIGEST_PREFIX);
        if let Some(file) = cache.find(key) {
            match load_compiled(engine, &file, None, Code::Mapped) {
                Ok(loaded) if loaded.digest == digest => return Ok(Loaded { path: path.to_path_buf(), ..loaded }),
                Ok(_) => tracing::warn!("{}: is of another component; compiling anew", file.display()),
                Err(err) => tracing::warn!("{err:#}; compiling anew"),
            }
            cache.forget(key);
        }
        let code = compiled(engine, &bytes).map_err(|err| not_loaded(path, err))?;
        let keep = || {
            let mut file = cache.begin()?;
            file.write_all(&code)?;
            cache.keep(file, key)
        };
        match keep() {
            Ok(file) => {
                tracing::info!("compiled {}; kept for the next start in {}", path.display(), file.display());
                let loaded = load_compiled(engine, &file, None, Code::Mapped)?;
                Ok(Loaded { path: path.to_path_buf(), ..loaded })
            }
            Err(err) => {
                tracing::info!("{err:#}; compiling {} at every start", path.display());
                from_code(engine, path, &code, digest)
            }
        }
    }

    /// The cache, where there can be one.
    #[cfg(feature = "compile")]
    fn cache(&self, engine: &Engine) -> Option<compiled_cache::Cache> {
        let folder = match &self.cache {
            _ if self.no_cache => return None,
            Some(folder) => folder.clone(),
            None => cache_home()?.join("mailroom"),
        };
        let id = id_of(engine);
        match compiled_cache::Cache::open(&folder, &id, self.cache_max.as_u64(), compiled_cache::Readers::Owner) {
            Ok(cache) => Some(cache),
            Err(err) => {
                tracing::info!("{err:#}; compiling at every start, as with --no-cache");
                None
            }
        }
    }

    #[cfg(not(feature = "compile"))]
    fn load_wasm(&self, _engine: &Engine, path: &Path, _pin: Option<&Pin>) -> Result<Loaded> {
        bail!(
            "{0}: has to be compiled, and this host has no compiler; run `host compile {0}` with one that has, and \
             load the .cwasm",
            path.display()
        )
    }
}

/// Where programs of this user keep what they can make again (XDG Base Directory Specification). Nothing, if the user
/// has no home.
#[cfg(feature = "compile")]
fn cache_home() -> Option<PathBuf> {
    let absolute = |name, below: &str| {
        let folder = PathBuf::from(std::env::var_os(name)?);
        folder.is_absolute().then(|| folder.join(below))
    };
    absolute("XDG_CACHE_HOME", "").or_else(|| absolute("HOME", ".cache"))
}

fn read_up_to(file: &mut File, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut length = 0;
    while length < buffer.len() {
        match file.read(&mut buffer[length..])? {
            0 => break,
            read => length += read,
        }
    }
    Ok(length)
}

/// Compiles the component that was read at `path`, for this run alone.
///
/// # Errors
/// One that does not validate, or is larger than a slot.
#[cfg(feature = "compile")]
pub fn from_bytes(engine: &Engine, path: &Path, bytes: &[u8]) -> Result<Loaded> {
    let code = compiled(engine, bytes).map_err(|err| not_loaded(path, err))?;
    from_code(engine, path, &code, digest(bytes))
}

/// Loads what was just compiled from the component that was read at `path`.
#[cfg(feature = "compile")]
fn from_code(engine: &Engine, path: &Path, bytes: &[u8], digest: String) -> Result<Loaded> {
    let copy = || -> std::io::Result<File> {
        let mut copy = in_memory()?;
        copy.write_all(bytes)?;
        seal(&copy)?;
        Ok(copy)
    };
    let code = copy().with_context(|| format!("keep the machine code of {}", path.display()))?;
    let component = mapped(engine, &code).map_err(|err| not_loaded(path, err))?;
    Ok(Loaded { component, digest, path: path.to_path_buf(), code })
}

/// Why a component that was read at `path` cannot be compiled, or mapped.
fn not_loaded(path: &Path, err: wasmtime::Error) -> anyhow::Error {
    let name = path.display();
    let err = anyhow::Error::from(err);
    // The allocator checks the sizes that the component starts with, after it has been validated.
    if format!("{err:#}").contains("pooling allocator") {
        return err.context(format!("{name}: is larger than a slot; a greater --memory-max may hold it"));
    }
    match path.extension() {
        Some(extension) if extension == "cwasm" => {
            err.context(format!("{name}: was compiled by another version or for another machine; {AGAIN}"))
        }
        _ => err.context(format!("{name}: is no valid component")),
    }
}

const AGAIN: &str = "make a new one with `host compile COMPONENT.wasm` of this version";

/// What of a `.cwasm` is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Code {
    /// The file, whose pages are shared with all that map it. Whoever changes the file changes what runs.
    Mapped,
    /// A copy of what was checked, that nobody can change.
    Copied,
}

impl Code {
    /// For a file of the operator's, which somebody may write over while it runs, unless its file system is read-only
    /// here, as it is in pods.
    fn of_operator(file: &File) -> Self {
        match rustix::fs::fstatvfs(file) {
            Ok(found) if found.f_flag.contains(StatVfsMountFlags::RDONLY) => Self::Mapped,
            _ => Self::Copied,
        }
    }
}

/// An empty file in memory (memfd_create(2)).
fn in_memory() -> std::io::Result<File> {
    Ok(memfd_create("mailroom-cwasm", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?.into())
}

/// From now on nobody can change the file in memory.
fn seal(file: &File) -> std::io::Result<()> {
    Ok(fcntl_add_seals(file, SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?)
}

/// The component of a `.cwasm` that was checked.
fn mapped(engine: &Engine, code: &File) -> wasmtime::Result<Component> {
    // By its number: what is mapped is what was checked, whatever its name leads to by now.
    let path = format!("/proc/self/fd/{}", code.as_raw_fd());
    // SAFETY: machine code has to be trusted. The operator named this file, `docs/operating.md` says what that means, or
    // it lies where nobody else can have put it; nobody can write to it while it is mapped; and wasmtime checks its
    // version, its target and its settings against the engine.
    unsafe { Component::deserialize_file(engine, path) }
}

/// Bytes of a `.cwasm` that are read at a time: little enough to stay in the nearest caches.
const PIECE_BYTES: usize = 64 << 10;

/// Reads a `.cwasm` of that many bytes to its end and writes it to `copy`: the SHA-256 of the component it was made of.
///
/// # Errors
/// Bytes without the trailer of this version, or with one that is of other code: what is wrong; or they cannot be read or
/// written.
fn opened(mut file: impl Read, bytes: u64, mut copy: impl Write) -> std::io::Result<[u8; HASH_BYTES]> {
    const CUT_SHORT: &str = "is no .cwasm of this host's version, or was cut short";
    let mut left = bytes.checked_sub(TRAILER_BYTES as u64).ok_or_else(|| std::io::Error::other(CUT_SHORT))?;
    let mut hash = blake3::Hasher::new();
    let mut piece = vec![0; PIECE_BYTES];
    while left > 0 {
        let piece = &mut piece[..usize::try_from(left).unwrap_or(PIECE_BYTES).min(PIECE_BYTES)];
        file.read_exact(piece)?;
        hash.update(piece);
        let_others_go_first();
        copy.write_all(piece)?;
        left -= piece.len() as u64;
    }
    let mut trailer = [0; TRAILER_BYTES];
    file.read_exact(&mut trailer)?;
    copy.write_all(&trailer)?;
    let (magic, hashes) = trailer.split_at(TRAILER_MAGIC.len());
    if magic != TRAILER_MAGIC {
        return Err(std::io::Error::other(CUT_SHORT));
    }
    let (of_all, of_component) = hashes.split_at(HASH_BYTES);
    if *hash.update(of_component).finalize().as_bytes() != *of_all {
        return Err(std::io::Error::other("is damaged"));
    }
    of_component.try_into().map_err(std::io::Error::other)
}

fn load_compiled(engine: &Engine, path: &Path, pin: Option<&Pin>, how: Code) -> Result<Loaded> {
    let name = path.display();
    let mut file = File::open(path).with_context(|| format!("open {name}"))?;
    let bytes = file.metadata().with_context(|| format!("look at {name}"))?.len();
    let wrong = |err| anyhow::anyhow!("{name}: {err}; {AGAIN}");
    let (code, of_component) = match how {
        Code::Mapped => {
            let of_component = opened(&mut file, bytes, std::io::sink()).map_err(wrong)?;
            (file, of_component)
        }
        Code::Copied => {
            let mut copy = in_memory().with_context(|| format!("copy {name}"))?;
            let of_component = opened(file, bytes, &mut copy).map_err(wrong)?;
            seal(&copy).with_context(|| format!("copy {name}"))?;
            (copy, of_component)
        }
    };
    let digest = format_digest(&of_component);
    Pin::check(pin, path, &digest)?;
    let component = mapped(engine, &code).map_err(|err| not_loaded(path, err))?;
    Ok(Loaded { component, digest, path: path.to_path_buf(), code })
}

const DIGEST_PREFIX: &str = "sha256:";

fn format_digest(hash: &[u8]) -> String {
    hash.iter().fold(DIGEST_PREFIX.to_string(), |text, byte| text + &format!("{byte:02x}"))
}

#[cfg(feature = "compile")]
pub use compiling::{CompileArgs, InspectArgs, compile, engine_id};
#[cfg(feature = "compile")]
pub(crate) use compiling::{Interfaces, digest, machine_code, read_component, write_atomically};
#[cfg(feature = "compile")]
use compiling::{compiled, id_of};

#[cfg(feature = "compile")]
mod compiling {
    use super::*;
    use crate::capabilities::provided;
    use crate::engine::{Cpu, config_for};
    use crate::interface::HANDLER;
    use crate::tables;
    use sha2::{Digest as _, Sha256};
    use std::borrow::Cow;
    use std::hash::{DefaultHasher, Hash as _, Hasher as _};
    use std::process::ExitCode;
    use wasi_preview1_component_adapter_provider::{
        WASI_SNAPSHOT_PREVIEW1_ADAPTER_NAME, WASI_SNAPSHOT_PREVIEW1_REACTOR_ADAPTER,
    };
    use wit_component::{ComponentEncoder, DecodedWasm, OutputToString, WitPrinter};

    /// Compile a component to machine code, or make a component of a core module
    #[derive(Debug, clap::Args)]
    #[command(after_help = "Examples:
  host compile triage.wasm                            writes triage.cwasm, machine code for `host run`
  host compile module.wasm --output triage.wasm       makes a component of a core module that embeds its world
  host compile triage.wasm --cpu native               for this processor only")]
    pub struct CompileArgs {
        /// The component, or a core module with its world embedded (wasi_snapshot_preview1 is adapted)
        input: PathBuf,
        /// Where to write: a .cwasm gets machine code, a .wasm gets the component [default: INPUT with .cwasm]
        #[arg(short, long, value_name = "FILE", env = "MAILROOM_OUTPUT")]
        output: Option<PathBuf>,
        /// The processor to compile for; code for a newer one is refused where it would run
        #[arg(long, value_enum, default_value_t, env = "MAILROOM_CPU")]
        cpu: Cpu,
    }

    /// Show what a component imports and exports, and what it would need to be granted
    #[derive(Debug, clap::Args)]
    pub struct InspectArgs {
        /// A component, a core module with its world embedded, or a .cwasm
        file: PathBuf,
        /// Print the component's WIT and nothing else
        #[arg(long, env = "MAILROOM_WIT", value_parser = clap::builder::BoolishValueParser::new())]
        wit: bool,
        /// Print JSON
        #[arg(long, env = "MAILROOM_JSON", value_parser = clap::builder::BoolishValueParser::new(), conflicts_with = "wit")]
        json: bool,
    }

    impl CompileArgs {
        /// Carries out `host compile`.
        ///
        /// # Errors
        /// An input that is no component and cannot be made one; an output that cannot be written.
        pub fn execute(&self) -> Result<ExitCode> {
            let output = self.output.clone().unwrap_or_else(|| self.input.with_extension("cwasm"));
            let component = read_component(&self.input)?;
            let bytes = match output.extension().and_then(|extension| extension.to_str()) {
                Some("cwasm") => machine_code(&component, self.cpu)
                    .with_context(|| format!("{}: is no valid component", self.input.display()))?,
                Some("wasm") => component.clone().into_owned(),
                _ => {
                    bail!("output {}: ends neither in .cwasm (machine code) nor in .wasm (component)", output.display())
                }
            };
            write_atomically(&output, &bytes).with_context(|| format!("write {}", output.display()))?;
            eprintln!("{}: {} bytes, from {}", output.display(), bytes.len(), digest(&component));
            Ok(ExitCode::SUCCESS)
        }
    }

    /// Compiles a component to a `.cwasm`, for the processors that `host compile` compiles for by default.
    ///
    /// # Errors
    /// Bytes that are no valid component.
    pub fn compile(component: &[u8]) -> Result<Vec<u8>> {
        match Kind::of(component) {
            Kind::Component => machine_code(component, Cpu::default()).context("is no valid component"),
            Kind::CoreModule => bail!(
                "is a core module, not a component; make one of it with `host compile MODULE.wasm --output \
                 COMPONENT.wasm`"
            ),
            kind => bail!("is {kind}; it takes a .wasm component"),
        }
    }

    /// The SHA-256 of `bytes`, as `sha256:…`.
    pub(crate) fn digest(bytes: &[u8]) -> String {
        format_digest(&Sha256::digest(bytes))
    }

    /// Names all that the code of [`compile`] depends on besides the component: the same for two executables whose
    /// code is the same.
    ///
    /// # Errors
    /// A processor that the compiler does not know.
    pub fn engine_id() -> Result<String> {
        Ok(id_of(&Engine::new(&config_for(Cpu::default())?)?))
    }

    /// Names all that machine code of `engine` depends on besides the component, this host's version included.
    pub(super) fn id_of(engine: &Engine) -> String {
        let mut hasher = DefaultHasher::new();
        engine.precompile_compatibility_hash().hash(&mut hasher);
        TRAILER_MAGIC.hash(&mut hasher);
        format!("{:016x}", hasher.finish())
    }

    /// Compiles a component to a `.cwasm`.
    ///
    /// # Errors
    /// Bytes that are no valid component.
    pub(crate) fn machine_code(component: &[u8], cpu: Cpu) -> Result<Vec<u8>> {
        Ok(compiled(&Engine::new(&config_for(cpu)?)?, component)?)
    }

    /// The `.cwasm` of a component for engines like this one.
    pub(super) fn compiled(engine: &Engine, component: &[u8]) -> wasmtime::Result<Vec<u8>> {
        let mut bytes = match tables::as_code(component) {
            // What is wrong is said of the component as it is.
            Cow::Owned(changed) => {
                engine.precompile_component(&changed).or_else(|_| engine.precompile_component(component))?
            }
            Cow::Borrowed(component) => engine.precompile_component(component)?,
        };
        let of_component = Sha256::digest(component);
        let hash = blake3::Hasher::new().update(&bytes).update(&of_component).finalize();
        bytes.extend_from_slice(TRAILER_MAGIC);
        bytes.extend_from_slice(hash.as_bytes());
        bytes.extend_from_slice(&of_component);
        Ok(bytes)
    }

    /// Writes a file whole or not at all, over one that is there.
    ///
    /// # Errors
    /// A folder that cannot be written to.
    pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut file = tempfile::Builder::new().permissions(permissions()).tempfile_in(folder)?;
        file.write_all(bytes)?;
        file.persist(path)?;
        Ok(())
    }

    fn permissions() -> std::fs::Permissions {
        std::os::unix::fs::PermissionsExt::from_mode(0o644)
    }

    /// The component in the file at `path`, made of a core module where it holds one.
    ///
    /// # Errors
    /// A file that cannot be read or holds neither.
    pub(crate) fn read_component(path: &Path) -> Result<Cow<'static, [u8]>> {
        let name = path.display();
        let bytes = std::fs::read(path).with_context(|| format!("read {name}"))?;
        match Kind::of(&bytes) {
            Kind::Component => Ok(bytes.into()),
            Kind::CoreModule => componentize(&bytes).with_context(|| name.to_string()).map(Cow::Owned),
            kind => bail!("{name}: is {kind}; it takes a component or a core module (.wasm)"),
        }
    }

    fn componentize(module: &[u8]) -> Result<Vec<u8>> {
        let component = ComponentEncoder::default()
            .validate(true)
            .module(module)
            .and_then(|encoder| {
                encoder.adapter(WASI_SNAPSHOT_PREVIEW1_ADAPTER_NAME, WASI_SNAPSHOT_PREVIEW1_REACTOR_ADAPTER)
            })
            .and_then(|mut encoder| encoder.encode())
            .context("make a component of the core module")?;
        if Interfaces::of(&component)?.exports.is_empty() {
            bail!(
                "the core module embeds no world: build it with wit-bindgen for the world `triage` of mailroom:triage, \
                 or add the world with `wasm-tools component embed`"
            );
        }
        Ok(component)
    }

    /// What a component imports and exports, without compiling it.
    pub(crate) struct Interfaces {
        /// The names of its imports.
        pub imports: Vec<String>,
        /// The names of its exports.
        pub exports: Vec<String>,
        wit: String,
    }

    impl Interfaces {
        /// # Errors
        /// Bytes that are no component.
        pub(crate) fn of(component: &[u8]) -> Result<Self> {
            let decoded = wit_component::decode(component).context("read the component's interfaces")?;
            let DecodedWasm::Component(resolve, world) = &decoded else {
                bail!("is a WIT package, not a component");
            };
            let names = |items: &wit_parser::IndexMap<wit_parser::WorldKey, wit_parser::WorldItem>| {
                items.keys().map(|key| resolve.name_world_key(key)).collect()
            };
            let (imports, exports) = (names(&resolve.worlds[*world].imports), names(&resolve.worlds[*world].exports));
            let mut printer = WitPrinter::new(OutputToString::default());
            let main = decoded.package();
            let others: Vec<_> = resolve.packages.iter().map(|(id, _)| id).filter(|id| *id != main).collect();
            printer.print(resolve, main, &others).context("print the component's WIT")?;
            Ok(Self { imports, exports, wit: printer.output.to_string() })
        }
    }

    impl InspectArgs {
        /// Carries out `host inspect`.
        ///
        /// # Errors
        /// A file that cannot be read or holds no component.
        pub fn execute(&self) -> Result<ExitCode> {
            let path = &self.file;
            let bytes = std::fs::read(path).with_context(|| format!("read {}", path.display()))?;
            let kind = Kind::of(&bytes);
            let (interfaces, digest) = if kind == Kind::Compiled {
                let engine = Engine::new(&crate::engine::config())?;
                let loaded = load_compiled(&engine, path, None, Code::Copied)?;
                let kind = loaded.component.component_type();
                let imports = kind.imports(&engine).map(|(name, _)| name.to_string()).collect();
                let exports = kind.exports(&engine).map(|(name, _)| name.to_string()).collect();
                (Interfaces { imports, exports, wit: String::new() }, loaded.digest)
            } else {
                let component = read_component(path)?;
                (Interfaces::of(&component).with_context(|| path.display().to_string())?, digest(&component))
            };
            let mut out = std::io::stdout().lock();
            if self.wit {
                if kind == Kind::Compiled {
                    bail!("{}: a .cwasm carries no WIT; inspect the .wasm it was made from", path.display());
                }
                write!(out, "{}", interfaces.wit)?;
                return Ok(ExitCode::SUCCESS);
            }
            let guest = interfaces.exports.iter().any(|export| export == HANDLER);
            if self.json {
                let imports: Vec<_> = interfaces
                    .imports
                    .iter()
                    .map(|import| serde_json::json!({ "name": import, "state": provided(import) }))
                    .collect();
                let report = serde_json::json!({
                    "file": path, "kind": kind.to_string(), "bytes": bytes.len(), "digest": digest,
                    "imports": imports, "exports": interfaces.exports, "guest": guest,
                });
                writeln!(out, "{report:#}")?;
                return Ok(ExitCode::SUCCESS);
            }
            writeln!(out, "file     {}", path.display())?;
            writeln!(out, "kind     {kind}, {} bytes", bytes.len())?;
            writeln!(out, "digest   {digest}")?;
            let answer = if guest { "yes: it exports" } else { "no: it does not export" };
            writeln!(out, "guest    {answer} {HANDLER}")?;
            for export in &interfaces.exports {
                writeln!(out, "export   {export}")?;
            }
            for import in &interfaces.imports {
                writeln!(out, "import   {import}  ({})", provided(import))?;
            }
            Ok(ExitCode::SUCCESS)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_told_apart_by_their_first_bytes() {
        for (bytes, kind) in [
            (&b"\0asm\x0d\0\x01\0"[..], Kind::Component),
            (b"\0asm\x01\0\0\0", Kind::CoreModule),
            (b"\x7fELF\x02", Kind::Compiled),
            (b"(component)", Kind::Unknown),
            (b"", Kind::Unknown),
        ] {
            assert_eq!(Kind::of(bytes), kind, "{bytes:?}");
        }
    }

    #[test]
    fn a_pin_is_a_whole_digest() {
        let digits = "0123456789abcdef".repeat(4);
        let pinned = format!("sha256:{digits}");
        let path = Path::new("triage.wasm");
        for text in [pinned.clone(), format!("sha256:{}", digits.to_uppercase())] {
            let pin = text.parse::<Pin>().expect("a pin");
            assert!(Pin::check(Some(&pin), path, &pinned).is_ok());
            let refused = Pin::check(Some(&pin), path, "sha256:00").expect_err("another").to_string();
            assert!(refused.contains("is sha256:00") && refused.contains(&pinned), "{refused}");
        }
        assert!(Pin::check(None, path, "sha256:00").is_ok());
        for text in ["", "sha256:", &digits, &pinned[..70], &format!("{pinned}0"), &pinned.replace('a', "g")] {
            assert!(text.parse::<Pin>().is_err(), "{text}");
        }
    }

    #[cfg(feature = "compile")]
    #[test]
    fn a_digest_names_its_algorithm() {
        assert_eq!(digest(b""), "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    }
}

#[cfg(test)]
mod fuzz {
    use super::*;
    use ::fuzz::{Strategy, any, check, collection, mutated};

    fn opened(bytes: &[u8]) -> std::io::Result<[u8; HASH_BYTES]> {
        let mut copy = Vec::new();
        let of_component = super::opened(bytes, bytes.len() as u64, &mut copy)?;
        assert_eq!(copy, bytes);
        Ok(of_component)
    }

    fn whole(code: &[u8], of_component: [u8; HASH_BYTES]) -> Vec<u8> {
        let hash = blake3::Hasher::new().update(code).update(&of_component).finalize();
        [code, TRAILER_MAGIC, hash.as_bytes(), &of_component].concat()
    }

    /// Bytes that no `host compile` has written, or that somebody has been at, never come to be taken for machine code.
    #[test]
    fn only_what_was_compiled_is_opened() {
        check("opening bytes that are anything", 3_000, collection::vec(any::<u8>(), 0..400), |bytes| {
            assert!(opened(&bytes).is_err());
        });
        // More than is read at a time.
        let code = (0..=255_u8).cycle().take(PIECE_BYTES + 700).collect::<Vec<u8>>();
        let original = whole(&code, [7; HASH_BYTES]);
        assert_eq!(opened(&original).ok(), Some([7; HASH_BYTES]));
        check("opening a .cwasm that was changed", 3_000, mutated(original.clone()), |bytes| {
            assert!(bytes == original || opened(&bytes).is_err(), "taken for whole");
        });
        let changed = collection::vec(any::<u8>(), 0..400).prop_flat_map(|code| {
            let whole = whole(&code, [9; HASH_BYTES]);
            mutated(whole.clone()).prop_map(move |changed| (whole.clone(), changed))
        });
        check("opening what was changed of any code", 3_000, changed, |(whole, changed)| {
            assert!(opened(&whole).is_ok());
            assert!(changed == whole || opened(&changed).is_err(), "taken for whole");
        });
    }

    /// Digests are read or refused, whatever the text, and what is read is what was meant.
    #[test]
    fn pins_are_digests() {
        check("reading a pinned digest", 3_000, "(sha256:)?[0-9a-fA-Fg:]{60,66}|\\PC{0,80}", |text| {
            if let Ok(Pin(pin)) = text.parse::<Pin>() {
                assert_eq!(pin, text.to_ascii_lowercase());
                assert_eq!(pin.len(), DIGEST_PREFIX.len() + 2 * HASH_BYTES);
            }
        });
    }
}
