//! What NVIDIA's driver says of the card: its version, and the clock it runs at.

#[cfg(all(feature = "cuda", target_os = "linux"))]
mod nvml {
    use nvml_wrapper::Nvml;
    use nvml_wrapper::enum_wrappers::device::Clock;

    pub struct Driver {
        nvml: Nvml,
        /// Of the card, to the library.
        index: u32,
    }

    impl Driver {
        /// Of the first card of that name, which is the one that CUDA calls 0 where all are alike.
        pub fn of(card: &str) -> Result<Self, String> {
            // the name that a driver without development files has
            let nvml = Nvml::builder().lib_path("libnvidia-ml.so.1".as_ref()).init().map_err(|e| e.to_string())?;
            let count = nvml.device_count().map_err(|e| e.to_string())?;
            let named =
                |&index: &u32| nvml.device_by_index(index).and_then(|d| d.name()).is_ok_and(|name| name == card);
            let index = (0..count).find(named).ok_or(format!("none of its {count} devices is called {card}"))?;
            Ok(Driver { nvml, index })
        }

        /// The driver's version and the newest CUDA that it runs.
        pub fn versions(&self) -> (Option<String>, Option<String>) {
            let cuda = self.nvml.sys_cuda_driver_version().ok();
            let cuda = cuda.map(|version| format!("CUDA {}.{}", version / 1000, version % 1000 / 10));
            (self.nvml.sys_driver_version().ok(), cuda)
        }

        /// Of the multiprocessors, now.
        pub fn sm_mhz(&self) -> Option<u32> {
            self.nvml.device_by_index(self.index).and_then(|device| device.clock_info(Clock::SM)).ok()
        }
    }
}

#[cfg(all(feature = "cuda", target_os = "linux"))]
pub use nvml::Driver;

/// Where there is none to ask.
#[cfg(not(all(feature = "cuda", target_os = "linux")))]
pub enum Driver {}

#[cfg(not(all(feature = "cuda", target_os = "linux")))]
impl Driver {
    pub fn of(_: &str) -> Result<Self, String> {
        Err("this build asks no driver".to_string())
    }

    pub fn versions(&self) -> (Option<String>, Option<String>) {
        match *self {}
    }

    pub fn sm_mhz(&self) -> Option<u32> {
        match *self {}
    }
}
