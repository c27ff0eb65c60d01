//! The rows: written to the CSV file as they come, printed, and read again for the pictures.

use crate::common::case::{Case, Implementation, Minimum, Pass, Unit};
use crate::common::machine::{Freed, Machine};
use crate::driver::Driver;
use crate::first;
use crate::rates::{Rate, Rates};
use crate::series::{Measured, Times};
use anyhow::{Context, Result};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

const COLUMNS: &str = "date,device,driver,toolkit,versions,threads,memory,implementation,loss,pass,dtype,shape,p20_us,\
                       p50_us,p80_us,bytes,bytes_formula,gb_per_s,share_of_copy,peak_bytes,method,sm_mhz";

/// What every row of a run says.
pub struct Environment {
    date: String,
    device: String,
    driver: String,
    toolkit: String,
    versions: String,
    threads: usize,
    memory: &'static str,
}

/// Of a run in which freed memory was not kept.
pub const FRESH: &str = "fresh";

impl Environment {
    pub fn new(machine: &Machine, driver: Option<&Driver>) -> Self {
        let (driver, toolkit) = if machine.device.is_cuda() {
            let (driver, cuda) = driver.map(Driver::versions).unwrap_or_default();
            let unknown = || "unknown".to_string();
            (driver.unwrap_or_else(unknown), cuda.unwrap_or_else(unknown))
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
            memory: match machine.freed {
                Freed::Kept => "kept",
                Freed::Returned => FRESH,
            },
        }
    }
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
    rates: Option<Rates>,
}

/// The heading of the printed lines.
pub const HEADING: &str = "loss/dtype/shape                                      implementation \
                           pass                        time us     p20     p80    GB/s  of copy  x candle \
                           x unfused   peak MB";

/// What a row is about.
struct Entry<'a> {
    implementation: &'a str,
    loss: &'a str,
    pass: &'a str,
    dtype: &'a str,
    shape: &'a str,
    times: Times,
    work: Minimum,
    peak_bytes: Option<usize>,
    method: &'a str,
    sm_mhz: Option<u32>,
    /// Of what was measured, where it is not this crate or candle.
    versions: Option<&'a str>,
}

impl Table {
    /// Begins a file named after the device, and after fresh memory. One that is there already is replaced.
    pub fn create(folder: &Path, environment: Environment) -> Result<Self> {
        std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        let slug = environment.device.to_lowercase().replace(|c: char| !c.is_ascii_alphanumeric(), "-");
        let slug = slug.split('-').filter(|part| !part.is_empty()).collect::<Vec<_>>().join("-");
        let kind = if environment.memory == FRESH { ".fresh" } else { "" };
        let path = folder.join(format!("{slug}{kind}.csv"));
        let mut file = File::create(&path).with_context(|| path.display().to_string())?;
        writeln!(file, "{COLUMNS}")?;
        Ok(Table { path, file, environment, rates: None })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Keeps the rates, which the shares of the rows after them refer to.
    pub fn rates(&mut self, rates: Rates, sm_mhz: Option<u32>) -> Result<()> {
        let mut rate = |implementation, pass, dtype, rate: &Rate| {
            let Rate { times, shape, work, method } = rate;
            let (times, work) = (*times, *work);
            self.write(Entry {
                implementation,
                loss: "-",
                pass,
                dtype,
                shape,
                times,
                work,
                peak_bytes: None,
                method,
                sm_mhz,
                versions: None,
            })
        };
        rate("memory", "copy", "-", &rates.copy)?;
        rate("memory", "read", "-", &rates.read)?;
        if let Some(matmul) = &rates.matmul {
            rate("matmul", "product", "bf16", matmul)?;
        }
        self.rates = Some(rates);
        Ok(())
    }

    /// The share of what the machine can do: of a copy's rate, or of a matrix product's.
    fn share(&self, work: Minimum, times: Times) -> Option<f64> {
        let rate = work.amount as f64 / times.p50 / 1e3;
        Some(rate / self.rates.as_ref()?.of(work.unit)?)
    }

    fn write(&mut self, entry: Entry) -> Result<()> {
        let Environment { date, device, driver, toolkit, versions, threads, memory } = &self.environment;
        let Entry { implementation, loss, pass, dtype, shape, times, work, peak_bytes, method, sm_mhz, .. } = entry;
        let Times { p20, p50, p80 } = times;
        let Minimum { amount, formula, .. } = work;
        let rate = amount as f64 / p50 / 1e3;
        let share = self.share(work, times).map_or(String::new(), |share| format!("{share:.4}"));
        let number = |n: Option<usize>| n.map_or(String::new(), |n| n.to_string());
        let (peak, sm_mhz) = (number(peak_bytes), number(sm_mhz.map(|mhz| mhz as usize)));
        let text = |s: &str| s.replace([',', '"', '\n'], " ");
        let (device, driver, toolkit) = (text(device), text(driver), text(toolkit));
        let versions = text(entry.versions.unwrap_or(versions));
        let row = format!(
            "{date},{device},{driver},{toolkit},{versions},{threads},{memory},{implementation},{loss},{pass},{dtype},\
             {shape},{p20:.3},{p50:.3},{p80:.3},{amount},{formula},{rate:.3},{share},{peak},{method},{sm_mhz}\n",
        );
        // one write for each row, so that a run that is cut off leaves whole rows
        self.file.write_all(row.as_bytes())?;
        Ok(self.file.flush()?)
    }

    /// Keeps the time of a process's first call.
    pub fn first_call(&mut self, implementation: &str, what: &str, us: f64) -> Result<()> {
        self.write(Entry {
            implementation,
            loss: what,
            pass: first::PASS,
            dtype: "f32",
            shape: &format!("{}x{}", first::ROWS, first::CLASSES),
            times: Times { p20: us, p50: us, p80: us },
            work: Minimum { amount: 0, formula: "-", unit: Unit::Bytes },
            peak_bytes: None,
            method: "host 1x1",
            sm_mhz: None,
            versions: None,
        })
    }

    /// Keeps the results of a series; the lines to print of them. `versions`: of the peers that they are of.
    pub fn results(&mut self, case: &Case, results: &[Measured], versions: Option<&str>) -> Result<Vec<String>> {
        let p50 = |implementation: Implementation| {
            let comparable = |r: &&Measured| {
                r.implementation == implementation.name() && matches!(r.pass, Pass::Forward | Pass::ForwardBackward)
            };
            Some(results.iter().find(comparable)?.times.as_ref().ok()?.p50)
        };
        let (candle, unfused) = (p50(Implementation::Candle), p50(Implementation::Unfused));
        let mut lines = vec![];
        for r in results {
            let (implementation, pass) = (&r.implementation, r.pass.name());
            let times = match &r.times {
                Ok(times) => *times,
                Err(e) => {
                    lines.push(format!("{:<53} {implementation:<14} {pass:<22} {e}", case.to_string()));
                    continue;
                }
            };
            let work = case.minimum(r.pass);
            self.write(Entry {
                implementation,
                loss: case.loss.name(),
                pass,
                dtype: case.dtype.as_str(),
                shape: &case.shape.to_string(),
                times,
                work,
                peak_bytes: r.peak_bytes,
                method: &r.method,
                sm_mhz: r.sm_mhz,
                versions,
            })?;
            let rate = work.amount as f64 / times.p50 / 1e3;
            let ratio = |of: Option<f64>| of.map_or("-".to_string(), |of| format!("{:.2}", of / times.p50));
            lines.push(format!(
                "{:<53} {implementation:<14} {pass:<22} {:>11.2} {:>7.1} {:>7.1} {rate:>7.1} {:>8} {:>9} {:>9} {:>9}",
                case.to_string(),
                times.p50,
                times.p20,
                times.p80,
                self.share(work, times).map_or("-".to_string(), |share| format!("{:.1}%", 100.0 * share)),
                ratio(candle),
                ratio(unfused),
                r.peak_bytes.map_or("-".to_string(), |bytes| format!("{:.1}", bytes as f64 / 1e6)),
            ));
        }
        Ok(lines)
    }
}

/// One row of a file.
pub struct Row {
    pub device: String,
    pub driver: String,
    pub date: String,
    /// Empty in files from before there was a choice.
    pub memory: String,
    pub implementation: String,
    pub loss: String,
    pub pass: String,
    pub dtype: String,
    pub shape: String,
    pub p50_us: f64,
    pub gb_per_s: f64,
    pub share_of_copy: Option<f64>,
    pub peak_bytes: Option<f64>,
    pub sm_mhz: Option<f64>,
}

impl Row {
    /// The rows and classes of a matrix of logits.
    pub fn matrix(&self) -> Option<(usize, usize)> {
        let (rows, classes) = self.shape.split_once('x')?;
        Some((rows.parse().ok()?, classes.parse().ok()?))
    }
}

/// The rows of a file, but for one that was cut off.
pub fn read(path: &Path) -> Result<Vec<Row>> {
    let mut lines = BufReader::new(File::open(path)?).lines();
    let heading = lines.next().context("an empty file")??;
    let names: Vec<&str> = heading.split(',').collect();
    let mut rows = vec![];
    for line in lines {
        let line = line?;
        let fields: Vec<&str> = line.split(',').collect();
        if fields.len() != names.len() {
            continue;
        }
        let field = |name: &str| names.iter().position(|n| *n == name).map(|at| fields[at]);
        let text = |name: &str| field(name).map(str::to_string).with_context(|| format!("no {name} in {line}"));
        let number = |name: &str| field(name).and_then(|text| text.parse::<f64>().ok());
        rows.push(Row {
            device: text("device")?,
            driver: text("driver")?,
            date: text("date")?,
            memory: field("memory").unwrap_or_default().to_string(),
            implementation: text("implementation")?,
            loss: text("loss")?,
            pass: text("pass")?,
            dtype: text("dtype")?,
            shape: text("shape")?,
            p50_us: number("p50_us").context("no time")?,
            gb_per_s: number("gb_per_s").context("no rate")?,
            share_of_copy: number("share_of_copy"),
            peak_bytes: number("peak_bytes"),
            sm_mhz: number("sm_mhz"),
        });
    }
    Ok(rows)
}
