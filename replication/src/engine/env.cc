// RocksDB's encrypted file system with Holdfast's provider below it.
//
// CTR must never cover two contents with one salt. RocksDB's defaults rewrite no file in place;
// GuardFs refuses by construction the three calls that could. The info log, which the encrypted
// file system would write in clear, is written encrypted should a caller ever open one.

#include <cstdint>
#include <memory>

#include "rocksdb/env.h"
#include "rocksdb/env_encryption.h"
#include "rocksdb/file_system.h"

using namespace ROCKSDB_NAMESPACE;

// The layout that RocksDB's C API gives its opaque rocksdb_env_t (db/c.cc).
struct rocksdb_env_t {
  Env* rep;
  bool is_default;
};

// Functions of env.rs. `open` answers null for a prefix that is not valid.
struct holdfast_cipher_calls {
  void* provider;
  int (*new_prefix)(void* provider, char* prefix, size_t length);
  void* (*open)(void* provider, const char* prefix, size_t length);
  void (*apply)(void* cipher, uint64_t offset, char* data, size_t length);
  void (*close)(void* cipher);
  void (*drop)(void* provider);
};

namespace {

constexpr size_t kPrefix = 4096;

class Stream : public BlockAccessCipherStream {
 public:
  Stream(const holdfast_cipher_calls& calls, void* cipher) : calls_(calls), cipher_(cipher) {}
  ~Stream() override { calls_.close(cipher_); }
  size_t BlockSize() override { return 16; }
  Status Encrypt(uint64_t offset, char* data, size_t size) override {
    if (size > 0) calls_.apply(cipher_, offset, data, size);
    return Status::OK();
  }
  Status Decrypt(uint64_t offset, char* data, size_t size) override {
    return Encrypt(offset, data, size);
  }

 protected:
  void AllocateScratch(std::string&) override {}
  Status EncryptBlock(uint64_t, char*, char*) override { return Status::NotSupported(); }
  Status DecryptBlock(uint64_t, char*, char*) override { return Status::NotSupported(); }

 private:
  holdfast_cipher_calls calls_;
  void* cipher_;
};

class Provider : public EncryptionProvider {
 public:
  explicit Provider(const holdfast_cipher_calls& calls) : calls_(calls) {}
  ~Provider() override { calls_.drop(calls_.provider); }
  const char* Name() const override { return "HoldfastProvider"; }
  size_t GetPrefixLength() const override { return kPrefix; }
  Status CreateNewPrefix(const std::string&, char* prefix, size_t length) const override {
    return calls_.new_prefix(calls_.provider, prefix, length) == 0
               ? Status::OK()
               : Status::IOError("no randomness for a file's salt");
  }
  Status AddCipher(const std::string&, const char*, size_t, bool) override {
    return Status::NotSupported("keys come from the keyring");
  }
  Status CreateCipherStream(const std::string& name, const EnvOptions&, Slice& prefix,
                            std::unique_ptr<BlockAccessCipherStream>* result) override {
    void* cipher = calls_.open(calls_.provider, prefix.data(), prefix.size());
    if (cipher == nullptr) {
      return Status::Corruption("encryption prefix is damaged or of an unknown key: " + name);
    }
    result->reset(new Stream(calls_, cipher));
    return Status::OK();
  }

 private:
  holdfast_cipher_calls calls_;
};

class GuardFs : public FileSystemWrapper {
 public:
  using FileSystemWrapper::FileSystemWrapper;
  const char* Name() const override { return "HoldfastGuardFs"; }
  IOStatus ReopenWritableFile(const std::string& name, const FileOptions&,
                              std::unique_ptr<FSWritableFile>*, IODebugContext*) override {
    return Refuse(name);
  }
  IOStatus ReuseWritableFile(const std::string& name, const std::string&, const FileOptions&,
                             std::unique_ptr<FSWritableFile>*, IODebugContext*) override {
    return Refuse(name);
  }
  IOStatus NewRandomRWFile(const std::string& name, const FileOptions&,
                           std::unique_ptr<FSRandomRWFile>*, IODebugContext*) override {
    return Refuse(name);
  }
  IOStatus NewLogger(const std::string& name, const IOOptions& options,
                     std::shared_ptr<Logger>* result, IODebugContext* debug) override {
    return FileSystem::NewLogger(name, options, result, debug);
  }

 private:
  static IOStatus Refuse(const std::string& name) {
    return IOStatus::NotSupported("an encrypted file is written once: " + name);
  }
};

}  // namespace

extern "C" rocksdb_env_t* holdfast_encrypted_env(const holdfast_cipher_calls* calls) {
  auto encrypted = NewEncryptedFS(FileSystem::Default(), std::make_shared<Provider>(*calls));
  if (encrypted == nullptr) return nullptr;
  auto* env = new rocksdb_env_t;
  env->rep = NewCompositeEnv(std::make_shared<GuardFs>(encrypted)).release();
  env->is_default = false;
  return env;
}
