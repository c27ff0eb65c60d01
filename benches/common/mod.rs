//! What both benches share: the cases, their data, what is timed and the clock.

mod backward;
pub mod case;
mod data;
#[cfg(feature = "cuda")]
pub mod gpu;
pub mod machine;
pub mod work;
