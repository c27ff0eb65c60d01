//! The rows: written to the CSV file as they come, printed, and read again for the pictures.

use crate::bandwidth::Rate;
use crate::common::case::{Case, Implementation, Pass};
use crate::common::machine::Machine;
use crate::series::{Measured, Times};
use anyhow::{Context, Result};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

const COLUMNS: &str = "date,device,driver,toolkit,versions,threads,implementation,loss,pass,dtype,shape,p20_us,p50_us,\
                       p80_us,bytes,bytes_formula,gb_per_s,share_of_copy,peak_bytes,method";

/// What every row of a run says.
pub struct Environment {
    date: String,
    device: String,
    driver: String,
    toolkit: String,
    versions: String,
    threads: usize,
}

impl Environment {
    pub fn new(machine: &Machine) -> Self {
        let (driver, toolkit) = if machine.device.is_cuda() {
            let query = ["--query-gpu=driver_version", "--format=csv,noheader"];
            (first_line("nvidia-smi", &query), cuda_version())
        } else {
            let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
            (format!("{} {}", std::env::consts::OS, kernel.trim()), first_line("rustc", &["--version"]))
        };
        let versions = format!("candle-fused-loss {}; candle {}", env!("CARGO_PKG_VERSION"), candle_version());
        Environment {
            date: date(SystemTime::now()),
            device: machine.name.clone(),
            driver,
            toolkit,
            versions,
            threads: rayon::current_num_threads(),
        }
    }
}

/// "CUDA 13.0", as far as the driver can run it.
fn cuda_version() -> String {
    let said = Command::new("nvidia-smi").output().ok().map(|out| String::from_utf8_lossy(&out.stdout).into_owned());
    let version = said.as_deref().and_then(|text| text.split_once("CUDA Version:")?.1.split_whitespace().next());
    version.map_or("unknown".to_string(), |version| format!("CUDA {version}"))
}

fn first_line(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().ok().filter(|out| out.status.success());
    let text = output.map(|out| String::from_utf8_lossy(&out.stdout).into_owned());
    text.as_deref().and_then(|text| text.lines().next()).unwrap_or("unknown").trim().to_string()
}

fn candle_version() -> &'static str {
    let lock = include_str!("../../Cargo.lock");
    let entry = lock.split("\nname = \"candle-core\"\nversion = \"").nth(1);
    entry.and_then(|rest| rest.split('"').next()).unwrap_or("unknown")
}

/// The day in UTC, as "2026-11-23".
fn date(time: SystemTime) -> String {
    let days = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() / 86400) as i64;
    // Howard Hinnant's civil_from_days, with years that begin in March
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}

pub struct Table {
    path: PathBuf,
    file: File,
    environment: Environment,
    copy_rate: f64,
}

/// The heading of the printed lines.
pub const HEADING: &str = "loss/dtype/shape                                      implementation pass                        \
                           time us     p20     p80    GB/s  of copy  x candle x unfused   peak MB";

impl Table {
    /// Begins a file named after the device. One that is there already is replaced.
    pub fn create(folder: &Path, environment: Environment) -> Result<Self> {
        std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        let slug = environment.device.to_lowercase().replace(|c: char| !c.is_ascii_alphanumeric(), "-");
        let slug = slug.split('-').filter(|part| !part.is_empty()).collect::<Vec<_>>().join("-");
        let path = folder.join(format!("{slug}.csv"));
        let mut file = File::create(&path).with_context(|| path.display().to_string())?;
        writeln!(file, "{COLUMNS}")?;
        Ok(Table { path, file, environment, copy_rate: f64::NAN })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The bandwidth that the following rows are compared with, in GB/s.
    pub fn share_of(&mut self, copy_rate: f64) {
        self.copy_rate = copy_rate;
    }

    pub fn bandwidth(&mut self, pass: &str, rate: &Rate) -> Result<()> {
        let shape = rate.bytes.to_string();
        let formula = if pass == "copy" { "read+written" } else { "read" };
        self.write(["memory", "-", pass, "-", &shape], &rate.times, (rate.bytes, formula), None, &rate.method)
    }

    fn write(
        &mut self,
        what: [&str; 5],
        times: &Times,
        (bytes, formula): (usize, &str),
        peak_bytes: Option<usize>,
        method: &str,
    ) -> Result<()> {
        let Environment { date, device, driver, toolkit, versions, threads } = &self.environment;
        let Times { p20, p50, p80 } = times;
        let rate = bytes as f64 / p50 / 1e3;
        let share = if self.copy_rate.is_nan() { String::new() } else { format!("{:.4}", rate / self.copy_rate) };
        let peak = peak_bytes.map_or(String::new(), |bytes| bytes.to_string());
        let text = |s: &str| s.replace([',', '"', '\n'], " ");
        let (device, driver, toolkit) = (text(device), text(driver), text(toolkit));
        let row = format!(
            "{date},{device},{driver},{toolkit},{versions},{threads},{},{p20:.3},{p50:.3},{p80:.3},{bytes},{formula},\
             {rate:.3},{share},{peak},{method}\n",
            what.join(",")
        );
        // one write for each row, so that a run that is cut off leaves whole rows
        self.file.write_all(row.as_bytes())?;
        Ok(self.file.flush()?)
    }

    /// Keeps the results of a series; the lines to print of them.
    pub fn results(&mut self, case: &Case, results: &[Measured]) -> Result<Vec<String>> {
        let p50 = |implementation: Implementation| {
            let comparable = |r: &&Measured| {
                r.implementation == implementation.name() && matches!(r.pass, Pass::Forward | Pass::ForwardBackward)
            };
            Some(results.iter().find(comparable)?.times.as_ref().ok()?.p50)
        };
        let (candle, unfused) = (p50(Implementation::Candle), p50(Implementation::Unfused));
        let mut lines = vec![];
        for r in results {
            let (implementation, pass) = (r.implementation, r.pass.name());
            let times = match &r.times {
                Ok(times) => times,
                Err(e) => {
                    lines.push(format!("{:<53} {implementation:<14} {pass:<22} {e}", case.to_string()));
                    continue;
                }
            };
            let bytes = case.bytes(r.pass);
            let what = [implementation, case.loss.name(), pass, case.dtype.as_str(), &case.shape()];
            self.write(what, times, bytes, r.peak_bytes, &r.method)?;
            let rate = bytes.0 as f64 / times.p50 / 1e3;
            let ratio = |of: Option<f64>| of.map_or("-".to_string(), |of| format!("{:.2}", of / times.p50));
            lines.push(format!(
                "{:<53} {implementation:<14} {pass:<22} {:>11.2} {:>7.1} {:>7.1} {rate:>7.1} {:>7.1}% {:>9} {:>9} {:>9}",
                case.to_string(),
                times.p50,
                times.p20,
                times.p80,
                100.0 * rate / self.copy_rate,
                ratio(candle),
                ratio(unfused),
                r.peak_bytes.map_or("-".to_string(), |bytes| format!("{:.1}", bytes as f64 / 1e6)),
            ));
        }
        Ok(lines)
    }
}

/// One row of a file, as far as the pictures need it.
pub struct Row {
    pub device: String,
    pub date: String,
    pub implementation: String,
    pub loss: String,
    pub pass: String,
    pub dtype: String,
    pub rows: usize,
    pub classes: usize,
    pub p50_us: f64,
    pub share_of_copy: Option<f64>,
    pub peak_bytes: Option<f64>,
}

/// The rows that are about a loss.
pub fn read(path: &Path) -> Result<Vec<Row>> {
    let mut lines = BufReader::new(File::open(path)?).lines();
    let heading = lines.next().context("an empty file")??;
    let names: Vec<&str> = heading.split(',').collect();
    let mut rows = vec![];
    for line in lines {
        let line = line?;
        let fields: Vec<&str> = line.split(',').collect();
        let field = |name: &str| {
            let at = names.iter().position(|n| *n == name)?;
            fields.get(at).copied()
        };
        let text = |name: &str| field(name).map(str::to_string).with_context(|| format!("no {name} in {line}"));
        let number = |name: &str| field(name).and_then(|text| text.parse::<f64>().ok());
        let shape = text("shape")?;
        let Some((n, v)) = shape.split_once('x') else { continue };
        rows.push(Row {
            device: text("device")?,
            date: text("date")?,
            implementation: text("implementation")?,
            loss: text("loss")?,
            pass: text("pass")?,
            dtype: text("dtype")?,
            rows: n.parse()?,
            classes: v.parse()?,
            p50_us: number("p50_us").context("no time")?,
            share_of_copy: number("share_of_copy"),
            peak_bytes: number("peak_bytes"),
        });
    }
    Ok(rows)
}
