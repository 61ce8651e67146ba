//! The engine's settings that compiled code depends on: one place, since a `.cwasm` only loads into an engine
//! configured as the one that compiled it.

use std::num::NonZeroUsize;
use wasmtime::Config;

/// Frames of a trap's backtrace that are worth keeping in a dead letter.
const BACKTRACE_FRAMES: NonZeroUsize = NonZeroUsize::new(20).expect("not zero");

/// The stack a guest may use, in bytes; one that needs more traps.
const WASM_STACK_BYTES: usize = 512 << 10;

/// The settings shared by compiling and running. The allocation strategy comes on top and does not matter to
/// compiled code.
pub fn config() -> Config {
    let mut config = Config::new();
    config
        .epoch_interruption(true)
        .concurrency_support(false)
        .max_wasm_stack(WASM_STACK_BYTES)
        .wasm_backtrace_max_frames(Some(BACKTRACE_FRAMES))
        // A backtrace names functions, not lines; where in the module each instruction was is a tenth of a `.cwasm`.
        .generate_address_map(false)
        // A fresh stack is not wiped between messages: wasm cannot read what it has not written to its stack.
        .async_stack_zeroing(false);
    config
}

/// The processor that `host compile` makes code for.
#[cfg(feature = "compile")]
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Cpu {
    /// Processors since about 2013 (AVX2, BMI2, FMA)
    #[value(name = "x86-64-v3")]
    X86_64V3,
    /// Processors since about 2009 (SSE4.2, POPCNT)
    #[value(name = "x86-64-v2")]
    X86_64V2,
    /// This machine's processor, with all it can do
    Native,
}

#[cfg(feature = "compile")]
impl Default for Cpu {
    fn default() -> Self {
        if cfg!(target_arch = "x86_64") { Self::X86_64V3 } else { Self::Native }
    }
}

/// [`config`], set to compile for `cpu`.
#[cfg(feature = "compile")]
pub(crate) fn config_for(cpu: Cpu) -> anyhow::Result<Config> {
    let mut config = config();
    let preset = match cpu {
        Cpu::Native => return Ok(config),
        Cpu::X86_64V2 => "x86-64-v2",
        Cpu::X86_64V3 => "x86-64-v3",
    };
    config.target("x86_64-unknown-linux-gnu")?;
    // SAFETY: the preset only says which instructions may be used; the engine that loads the code refuses it on a
    // processor without them. Nothing else of the code generator is touched.
    unsafe { config.cranelift_flag_enable(preset) };
    Ok(config)
}
